"""Files and folders that are whole or absent, locks, records, tables, templates, progress."""
