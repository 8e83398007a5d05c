"""The `mir` command: files, folders, processes and terminal output."""
