"""Files and folders that are whole or absent, locks, records, tables, progress."""
