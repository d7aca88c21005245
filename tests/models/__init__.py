"""Every model of the table, on tiny random configurations."""
