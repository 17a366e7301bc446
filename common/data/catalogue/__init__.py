"""What every data set is: rows by name, where their files lie, class tables."""
