"""Starting the processes of a job on this host, watching them and restarting them."""
