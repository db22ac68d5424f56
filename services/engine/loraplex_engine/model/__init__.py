"""The Llama-family decoder, in torch."""
