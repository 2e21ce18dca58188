"""Files, open files and processes, as the operating system has them."""
