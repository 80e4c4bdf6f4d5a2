"""Data: reads rows, renders and tokenizes them with exact loss masks, deals them to the ranks."""
