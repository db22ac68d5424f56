"""What the benchmark scripts share: shapes, adapters, engines, floors, peers' figures and result files."""
