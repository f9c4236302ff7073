"""What requests mean and how answers look: pure parsers and writers of each dialect."""
