"""What was measured → numbers with names, and gates that hold or do not."""
