"""Streams of events through a gateway: paced engine doubles, clients that are no bottleneck, and the sums over both."""
