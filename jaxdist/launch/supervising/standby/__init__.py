"""The processes of the next attempt, in reserve while one runs."""
