use change::TupleError;

/// The bytes are not a message of pgoutput version 1. The server speaks something we do not understand; going on
/// could lose changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DecodeError {
    /// There is no byte at all.
    #[error("empty pgoutput message")]
    Empty,
    /// The first byte names no message of version 1.
    #[error("unknown pgoutput message: byte {0:#04x}")]
    UnknownTag(u8),
    /// The bytes end inside the message.
    #[error("pgoutput message `{0}` is cut short")]
    Truncated(char),
    /// Bytes follow the message.
    #[error("pgoutput message `{tag}` is followed by {extra} bytes that do not belong to it")]
    Trailing {
        /// The message.
        tag: char,
        /// How many bytes.
        extra: usize,
    },
    /// A name is not UTF-8.
    #[error("a name in pgoutput message `{0}` is not UTF-8; the connection's client_encoding must be UTF8")]
    NotUtf8(char),
    /// A flag or kind byte has a value that version 1 does not have.
    #[error("pgoutput message `{tag}` has {what} {byte:#04x}, which version 1 does not know")]
    UnknownByte {
        /// The message.
        tag: char,
        /// What the byte says.
        what: &'static str,
        /// The byte.
        byte: u8,
    },
    /// A row cannot be read.
    #[error("pgoutput message `{tag}`: {error}")]
    Tuple {
        /// The message.
        tag: char,
        /// What is wrong with the row.
        error: TupleError,
    },
}
