"""What a chat's output is made of: thoughts, content, tool calls."""
