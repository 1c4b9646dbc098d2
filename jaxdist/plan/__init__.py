"""What a compiled program will need and do, read off the program."""
