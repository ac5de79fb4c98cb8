"""What evaluate does with each kind of test rows: dialogues, running text, rows to classify."""
