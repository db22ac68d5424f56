"""Makes a JSON Schema ready for the library: what it would enforce wrongly is rewritten, what it would not is refused.

The library enforces most keywords and refuses those that it knows it cannot. Between the two lie texts that it reads
otherwise than JSON Schema does; this module knows them. Whatever comes out of it is either enforced as written or refused
by the name of its keyword.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

from loraplex_engine.constraints import keywords
from loraplex_engine.constraints.exclusive import cases_of
from loraplex_engine.constraints.formats import (
    INTEGER_BOUNDS,
    LIBRARY_FORMATS,
    NUMBER_FORMATS,
    PATTERNS,
    STRING_FORMATS,
)
from loraplex_engine.constraints.guidance import read_guidance
from loraplex_engine.constraints.json_text import ConstraintTextError, read_json
from loraplex_engine.constraints.patterns import to_library
from loraplex_engine.constraints.property_counts import with_combinations
from loraplex_engine.constraints.references import Reference, check_references
from loraplex_engine.constraints.repeated_factors import check_factors
from loraplex_engine.constraints.schema_values import (
    check_names,
    check_numbers,
    check_text,
    check_type,
    check_value,
    escaped,
    not_numbers,
    read_count,
    read_pattern,
    unsupported,
)

Schema: TypeAlias = dict[str, Any]


def prepare_schema(text: str, *, compact: bool = False) -> Schema:
    """Return the schema for the library, with its options for the output's form.

    Args:
        text: The JSON of the schema, an object or a boolean.
        compact: Whether the output has no blanks at all.

    Raises:
        ConstraintTextError: If it is no JSON, or has what cannot be enforced; the message names the keyword and its place.
    """
    schema = read_json(text)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ConstraintTextError(f"a schema is an object or true, not {json.dumps(schema)[:40]}")
    guidance = read_guidance(schema.pop("x-guidance", {}), compact=compact)
    reader = _SchemaReader(schema)
    prepared: Schema = reader.read(schema, _Spot("#", "#"))
    check_references(reader.references, prepared, reader.places, has_ids=reader.has_ids)
    check_factors(reader.factors, may_meet=reader.may_meet)
    for choice in reader.choices:
        cases = choice["oneOf"]
        if not guidance.coerces_one_of:
            cases = cases_of(cases, prepared, draft=reader.draft, has_ids=reader.has_ids)
        if cases is not None:
            _write_as_any_of(choice, cases)
    prepared["x-guidance"] = guidance.form
    return prepared


def _write_as_any_of(schema: Schema, cases: list[Any]) -> None:
    """Write oneOf as an anyOf of these cases, in place."""
    del schema["oneOf"]
    if "anyOf" in schema:
        schema["allOf"] = [*schema.get("allOf", []), {"anyOf": cases}]
    else:
        schema["anyOf"] = cases


class _Spot(NamedTuple):
    """Where a (sub)schema is, and where its references start from: JSON pointers with a leading #."""

    place: str
    base: str

    def at(self, *keys: str) -> _Spot:
        return self._replace(place="/".join([self.place, *map(escaped, keys)]))


def _says_nothing(key: str, value: Any) -> bool:
    return key in keywords.HARMLESS and value is keywords.HARMLESS[key]


class _SchemaReader:
    """Rewrites one schema; keeps what must be looked at as a whole."""

    def __init__(self, root: Schema) -> None:
        dialect = root.get("$schema", "")
        draft = keywords.NEWEST_DRAFT if dialect == "" else keywords.DRAFTS.get(str(dialect).removesuffix("#"))
        if draft is None:
            known = ", ".join(keywords.DRAFTS)
            raise ConstraintTextError(f"keyword '$schema' names a dialect that is not known here; known are {known}")
        self.draft = draft
        self.places: set[str] = set()
        self.references: list[Reference] = []
        self.factors: set[float] = set()
        self.choices: list[Schema] = []  # schemas with oneOf
        self.has_ids = self.may_meet = False

    def read(self, schema: Any, spot: _Spot) -> Any:
        """Return one (sub)schema as the library shall read it.

        Raises:
            ConstraintTextError: If it cannot be enforced.
        """
        self.places.add(spot.place)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise ConstraintTextError(f"the schema at {spot.place} is neither an object nor a boolean")
        schema = {key: value for key, value in schema.items() if not _says_nothing(key, value)}
        self._refuse(schema, spot.place)
        if "$ref" in schema and self.draft <= 7:  # there a reference hides its siblings
            schema = {key: value for key, value in schema.items() if key in ("$ref", "$defs", "definitions")}
        if not str(schema.get("$id", "#")).startswith("#"):
            spot = spot._replace(base=spot.place)
            self.has_ids = True
        if "$ref" in schema:
            self.references.append(Reference(schema["$ref"], spot.place, spot.base))
        extra: list[Schema] = []
        check_numbers(schema, spot.place)
        prepared = {key: self._value(key, value, spot, extra) for key, value in schema.items()}
        prepared = self._in_order(with_combinations(prepared, spot.place), extra)
        self.may_meet |= "allOf" in prepared or bool(prepared.keys() & {"$ref", "anyOf", "oneOf"} and len(prepared) > 1)
        if "oneOf" in prepared:
            self.choices.append(prepared)
        return prepared

    def _refuse(self, schema: Schema, place: str) -> None:
        for key in schema:
            if key in keywords.REFUSED:
                raise unsupported(key, place, keywords.REFUSED[key])
            if key in keywords.CONTENT and self.draft <= 7:
                raise unsupported(key, place, "leave it out, or use pattern")
            if key == "x-guidance":
                raise unsupported(key, place, "it belongs to the top of the schema")
        if "prefixItems" in schema and ("additionalItems" in schema or self.draft < 2020):
            raise unsupported("prefixItems", place, "before draft 2020-12 it is a list under items")
        is_list = isinstance(schema.get("items"), list)
        if "additionalItems" in schema and self.draft >= 2020 and not is_list:
            raise unsupported("additionalItems", place, "since draft 2020-12 it is called items")

    def _value(self, key: str, value: Any, spot: _Spot, extra: list[Schema]) -> Any:
        place = spot.place
        if key in keywords.SCHEMA and not isinstance(value, list):
            return self.read(value, spot.at(key))
        if key in keywords.LIST_OF_SCHEMAS or key == "items":
            if not isinstance(value, list):
                raise ConstraintTextError(f"keyword {key!r} at {place} must have a list")
            return [self.read(item, spot.at(key, str(index))) for index, item in enumerate(value)]
        if key in keywords.MAP_OF_SCHEMAS:
            return self._map(key, value, spot)
        if key == "format":
            return self._format(value, place, extra)
        if key == "pattern":
            return read_pattern(value, key, place)
        if key in keywords.COUNTS:
            return read_count(value, key, place)
        if key == "multipleOf":
            self.factors.add(abs(value))
        elif key in ("const", "enum"):
            check_value(value, key, place)
        elif key == "type":
            check_type(value, place)
        elif key == "required":
            check_names(value, key, place)
        return value

    def _map(self, key: str, value: Any, spot: _Spot) -> Schema:
        if not isinstance(value, dict):
            raise ConstraintTextError(f"keyword {key!r} at {spot.place} must have an object")
        names = [read_pattern(name, key, spot.place) if key == "patternProperties" else name for name in value]
        if len(set(names)) < len(names):
            raise unsupported(key, spot.place, "two of its patterns mean the same")
        if key == "properties":
            for name in names:
                check_text(name, key, spot.place)
        return {
            name: self.read(item, spot.at(key, original))
            for name, (original, item) in zip(names, value.items(), strict=True)
        }

    @staticmethod
    def _format(name: Any, place: str, extra: list[Schema]) -> Any:
        if name in INTEGER_BOUNDS:
            low, high = INTEGER_BOUNDS[name]
            extra.append({"anyOf": [{"type": "number", "minimum": low, "maximum": high}, *not_numbers()]})
        elif name in PATTERNS:
            extra.append({"pattern": to_library(PATTERNS[name])})
        elif name not in STRING_FORMATS and name not in NUMBER_FORMATS:
            known = ", ".join(sorted(STRING_FORMATS))
            raise unsupported("format", place, f"{name!r} is not known; known are {known}")
        return name if name in LIBRARY_FORMATS else None

    @staticmethod
    def _in_order(prepared: Schema, extra: list[Schema]) -> Schema:
        """Put what the library reads together beside each other, and last what it intersects with that."""
        if extra:
            prepared = prepared | {"allOf": [*prepared.get("allOf", []), *extra]}
        prepared = {key: value for key, value in prepared.items() if not (key == "format" and value is None)}
        first = {key: value for key, value in prepared.items() if key not in keywords.IN_PLACE}
        return first | {key: prepared[key] for key in keywords.IN_PLACE if key in prepared}
