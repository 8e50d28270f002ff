"""What commands need of the machine: files, signals, child processes, numbers as text."""
