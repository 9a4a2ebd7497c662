"""An artifact and the checkpoint it was made from → a report that shows whether they compute the same."""
