"""The `mir` command: everything that knows files, folders, processes, and a person at a terminal."""
