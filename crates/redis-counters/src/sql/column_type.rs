//! The types that a counter may compare and group by, and what holds for each.

use std::fmt;

/// A base type whose comparison here is exactly Postgres's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Type {
    Boolean,
    SmallInt,
    Integer,
    BigInt,
    Numeric,
    Real,
    Double,
    /// `text` and `character varying`, which differ in nothing but their length check.
    Text,
    /// `character(n)`: trailing blanks do not count in comparisons, but do in LIKE.
    Char,
    Uuid,
    Date,
    Timestamp,
    TimestampTz,
}

/// Types whose values compare with each other, whatever their width.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    Boolean,
    ExactNumber,
    Float,
    Text,
    Char,
    Uuid,
    Date,
    Timestamp,
    TimestampTz,
}

impl Type {
    /// By the object id of a base type, as in `pg_type.dat`.
    pub(crate) fn of(type_oid: u32) -> Option<Type> {
        Some(match type_oid {
            16 => Type::Boolean,
            20 => Type::BigInt,
            21 => Type::SmallInt,
            23 => Type::Integer,
            25 | 1043 => Type::Text,
            700 => Type::Real,
            701 => Type::Double,
            1042 => Type::Char,
            1082 => Type::Date,
            1114 => Type::Timestamp,
            1184 => Type::TimestampTz,
            1700 => Type::Numeric,
            2950 => Type::Uuid,
            _ => return None,
        })
    }

    /// By the name in a cast. `character(n)` is not there: such a cast cuts and pads its literal.
    pub(crate) fn named(name: &str) -> Option<Type> {
        Some(match name.to_ascii_lowercase().as_str() {
            "boolean" | "bool" => Type::Boolean,
            "smallint" | "int2" => Type::SmallInt,
            "integer" | "int" | "int4" => Type::Integer,
            "bigint" | "int8" => Type::BigInt,
            "numeric" | "decimal" | "dec" => Type::Numeric,
            "real" | "float4" => Type::Real,
            "double precision" | "float" | "float8" => Type::Double,
            "text" | "varchar" | "character varying" => Type::Text,
            "uuid" => Type::Uuid,
            "date" => Type::Date,
            "timestamp" | "timestamp without time zone" => Type::Timestamp,
            "timestamptz" | "timestamp with time zone" => Type::TimestampTz,
            _ => return None,
        })
    }

    pub(crate) fn family(self) -> Family {
        match self {
            Type::Boolean => Family::Boolean,
            Type::SmallInt | Type::Integer | Type::BigInt | Type::Numeric => Family::ExactNumber,
            Type::Real | Type::Double => Family::Float,
            Type::Text => Family::Text,
            Type::Char => Family::Char,
            Type::Uuid => Family::Uuid,
            Type::Date => Family::Date,
            Type::Timestamp => Family::Timestamp,
            Type::TimestampTz => Family::TimestampTz,
        }
    }

    pub(crate) fn is_integer(self) -> bool {
        matches!(self, Type::SmallInt | Type::Integer | Type::BigInt)
    }

    /// Whether comparing needs a collation.
    pub(crate) fn is_collated(self) -> bool {
        matches!(self, Type::Text | Type::Char)
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Boolean => "boolean",
            Type::SmallInt => "smallint",
            Type::Integer => "integer",
            Type::BigInt => "bigint",
            Type::Numeric => "numeric",
            Type::Real => "real",
            Type::Double => "double precision",
            Type::Text => "text",
            Type::Char => "character",
            Type::Uuid => "uuid",
            Type::Date => "date",
            Type::Timestamp => "timestamp",
            Type::TimestampTz => "timestamptz",
        })
    }
}
