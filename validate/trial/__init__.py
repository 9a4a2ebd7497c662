"""What is to be compared → findings: both sides run, whole in memory or one layer at a time."""
