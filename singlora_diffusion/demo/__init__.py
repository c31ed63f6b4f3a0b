"""`singlora demo`: all three jobs on a toyworld subject that the model has never seen, with a report."""
