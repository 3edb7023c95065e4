"""Reports: tables, figures and pages from finished runs."""
