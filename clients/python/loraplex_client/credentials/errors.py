"""What can go wrong when credentials are made."""


class CredentialsError(RuntimeError):
    """Credentials cannot be made or used; the message has the file and the remedy, never a secret."""
