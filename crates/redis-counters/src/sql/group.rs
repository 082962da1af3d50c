//! What stands for all equal values of a group column in the name of a group.

use super::column_type::Type;
use super::decimal::trim_scale;

/// The one text that stands for all equal values of the type.
pub(crate) fn normalised(kind: Type, text: &str) -> &str {
    match kind {
        Type::Numeric => trim_scale(text),
        Type::Char => text.trim_end_matches(' '),
        _ => text,
    }
}
