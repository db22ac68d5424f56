"""Makes what the parts of a deployment prove themselves with: certificates, API keys and Valkey's passwords.

`folder` and `authority` need the extra ``credentials``; a process that only serves or only calls does not.
"""
