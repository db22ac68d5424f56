"""What requests use: page-seconds that engines report, the ledger in Valkey, and the greatest users as metrics."""
