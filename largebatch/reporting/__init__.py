"""What people look at: tables, plots, metrics, progress."""
