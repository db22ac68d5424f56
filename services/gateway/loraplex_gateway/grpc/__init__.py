"""The gRPC services of the gateway: convert, call, convert back."""
