"""What tenants may use: `ledger` has the arithmetic, `script` the same in Valkey, `accounts` the tenants, `calls` what a client's call asks for."""
