"""What is done to one layer of any model: find it, read it, run the rest from it on, and leave the model as it was."""
