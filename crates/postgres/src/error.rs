use std::io;

use change::Refusal;
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::ErrorFields;
use relay::SourceError;

use crate::config::ConfigError;

/// What the server says is wrong.
#[derive(Clone, PartialEq, Eq, Debug, Default, thiserror::Error)]
#[error("{message}{}{} (SQLSTATE {code})", part("; ", .detail), part("; hint: ", .hint))]
pub struct ServerError {
    /// Five letters and digits: <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
    pub code: String,
    /// One line.
    pub message: String,
    /// More of it, or empty.
    pub detail: String,
    /// What the server would do about it, or empty.
    pub hint: String,
}

fn part(before: &str, text: &str) -> String {
    if text.is_empty() { String::new() } else { format!("{before}{text}") }
}

impl ServerError {
    pub(crate) fn read(mut fields: ErrorFields<'_>) -> io::Result<Self> {
        let mut error = ServerError::default();
        while let Some(field) = fields.next()? {
            let slot = match field.type_() {
                b'C' => &mut error.code,
                b'M' => &mut error.message,
                b'D' => &mut error.detail,
                b'H' => &mut error.hint,
                _ => continue,
            };
            *slot = String::from_utf8_lossy(field.value_bytes()).into_owned();
        }
        Ok(error)
    }

    /// Another session holds the slot.
    pub fn slot_is_active(&self) -> bool {
        self.code == "55006"
    }

    /// The object named does not exist: the slot when streaming was asked for, the publication while it runs.
    pub fn does_not_exist(&self) -> bool {
        self.code == "42704"
    }

    /// The slot cannot be read any more: it was invalidated, belongs elsewhere, or its WAL is gone.
    pub fn slot_is_unusable(&self) -> bool {
        self.code == "55000" || self.message.contains("has already been removed")
    }

    /// Trying again cannot help: the role, its password, the database or a privilege is wrong.
    pub fn needs_the_operator(&self) -> bool {
        self.code.starts_with("28") || matches!(self.code.as_str(), "3D000" | "42501" | "0A000")
    }
}

/// Why a connection failed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The network, or the server's end of it.
    #[error("{server}: {error}")]
    Io {
        /// Which server.
        server: String,
        /// What happened.
        error: io::Error,
    },
    /// The server refused something.
    #[error("{server}: {error}")]
    Server {
        /// Which server.
        server: String,
        /// What it said.
        error: ServerError,
    },
    /// Logging in as configured is not possible.
    #[error("{server}: {reason}")]
    Authentication {
        /// Which server.
        server: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl ConnectionError {
    /// What the server said, if it did.
    pub fn server_error(&self) -> Option<&ServerError> {
        match self {
            ConnectionError::Server { error, .. } => Some(error),
            _ => None,
        }
    }

    /// From tokio-postgres, whose errors print as their kind only.
    pub(crate) fn from_client(server: impl ToString, error: &tokio_postgres::Error) -> Self {
        let server = server.to_string();
        if let Some(db) = error.as_db_error() {
            let error = ServerError {
                code: db.code().code().to_owned(),
                message: db.message().to_owned(),
                detail: db.detail().unwrap_or_default().to_owned(),
                hint: db.hint().unwrap_or_default().to_owned(),
            };
            return ConnectionError::Server { server, error };
        }
        let mut text = error.to_string();
        let mut source = std::error::Error::source(error);
        while let Some(cause) = source {
            text = format!("{text}: {cause}");
            source = cause.source();
        }
        // tokio-postgres does not say which of its errors come of the configuration, except by these words.
        if text.starts_with("invalid configuration") || text.starts_with("authentication error") {
            return ConnectionError::Authentication { server, reason: text };
        }
        ConnectionError::Io { server, error: io::Error::other(text) }
    }
}

impl From<ConnectionError> for SourceError {
    fn from(error: ConnectionError) -> Self {
        let refused = match &error {
            ConnectionError::Io { .. } => false,
            ConnectionError::Server { error, .. } => error.needs_the_operator(),
            ConnectionError::Authentication { .. } | ConnectionError::Config(_) => true,
        };
        if refused {
            let remedy = match error.server_error().map(|error| error.code.as_str()) {
                Some("42501") => "grant the role what `millrace setup --dry-run` prints",
                _ => "correct [postgres] url, the password, or the server's pg_hba.conf",
            };
            SourceError::Refused(Refusal::new(error.to_string(), remedy))
        } else {
            SourceError::Unavailable(error.to_string())
        }
    }
}

/// What tokio-postgres says of what was being done.
pub(crate) fn failed(doing: &str, error: &tokio_postgres::Error) -> SourceError {
    ConnectionError::from_client(doing, error).into()
}
