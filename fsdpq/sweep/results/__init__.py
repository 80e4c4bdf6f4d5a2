"""What came of a sweep: measures, tables, the page, whether it is good enough."""
