"""HTML pages: one file each, which loads nothing and runs nothing; torch-free."""
