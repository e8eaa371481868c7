"""HTML pages and charts; draws what it is given."""
