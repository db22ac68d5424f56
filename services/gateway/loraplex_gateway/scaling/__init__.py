"""What autoscalers ask: how much waits for engines, fleet-wide, and how full the engines are."""
