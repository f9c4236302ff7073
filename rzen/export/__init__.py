"""What other libraries need beside the weights of an exported model, a file for each of them."""
