"""A request's way: checked, prepared, admitted, claimed, relayed to engines, answered, counted."""
