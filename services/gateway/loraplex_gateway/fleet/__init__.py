"""The page pools of all engines, for operators."""
