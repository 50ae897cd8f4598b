"""One SQLite file of facts: machines, calibrations, runs; what is best is a query over them."""
