"""What tenants may use: `ledger` has the arithmetic, `script` the same in Valkey, `accounts` who asks, `calls` what is asked."""
