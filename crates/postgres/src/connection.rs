//! The replication connection: runs the few commands of the replication protocol, and after START_REPLICATION gives its
//! socket away to [`crate::stream`]. An error says what the server said, so that "the slot is in use", "the slot is gone"
//! and "the network is gone" stay apart.
//!
//! <https://www.postgresql.org/docs/current/protocol-replication.html>

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use change::{Lsn, Timeline};
use postgres_protocol::message::backend::Message;

use crate::config::{Config, Target};
use crate::error::ConnectionError;
use crate::session::{Rows, Session, Socket, message_length};

/// Tag of CopyBothResponse, which postgres-protocol does not know.
const COPY_BOTH: u8 = b'W';

/// A logged-in connection in replication mode, on the configured database.
pub struct ReplicationConnection(Session);

impl ReplicationConnection {
    /// Connects to the first server that lets us in.
    pub async fn connect(config: &Config) -> Result<Self, ConnectionError> {
        let mut last = None;
        for target in config.targets() {
            match Self::connect_to(target).await {
                Ok(connection) => return Ok(connection),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| {
            let reason = "no server is named".to_owned();
            crate::config::ConfigError::Malformed(reason).into()
        }))
    }

    /// Connects to one server.
    pub async fn connect_to(target: &Target) -> Result<Self, ConnectionError> {
        Session::connect(target, true).await.map(ReplicationConnection)
    }

    /// Runs one command and gives the rows it returns.
    pub(crate) async fn command(&mut self, command: &str) -> Result<Rows, ConnectionError> {
        self.0.command(command).await
    }

    /// Who the server is, and its WAL's flush position.
    pub async fn identify_system(&mut self) -> Result<(Timeline, Lsn), ConnectionError> {
        let rows = self.command("IDENTIFY_SYSTEM").await?;
        let field = |i: usize| text(rows.first().and_then(|row| row.get(i)));
        let parsed = (field(0), field(1).and_then(|t| t.parse().ok()), field(2).and_then(|t| t.parse().ok()));
        match parsed {
            (Some(system_id), Some(timeline), Some(lsn)) => {
                Ok((Timeline { system_id: system_id.to_owned(), timeline }, lsn))
            }
            _ => Err(self.0.misunderstood("IDENTIFY_SYSTEM gave no system id, timeline and position")),
        }
    }

    /// The LSN at which `timeline` (which the server must know) left its ancestor `ancestor`; `None` when that
    /// is not one of its ancestors.
    pub async fn switch_point(
        &mut self,
        timeline: u32,
        ancestor: u32,
    ) -> Result<Option<Lsn>, ConnectionError> {
        if ancestor >= timeline {
            return Ok(None);
        }
        let rows = self.command(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let history = text(rows.first().and_then(|row| row.get(1)));
        let history = history.ok_or_else(|| self.0.misunderstood("TIMELINE_HISTORY gave no history"))?;
        switch_point(history, ancestor)
            .map_err(|line| self.0.misunderstood(&format!("timeline history: `{line}`")))
    }

    /// How long the server waits for a sign of life; `None` for ever.
    pub async fn wal_sender_timeout(&mut self) -> Result<Option<Duration>, ConnectionError> {
        let query = "SELECT setting::bigint FROM pg_catalog.pg_settings WHERE name = 'wal_sender_timeout'";
        let rows = self.command(query).await?;
        let millis = text(rows.first().and_then(|row| row.first())).and_then(|text| text.parse().ok());
        let millis: u64 = millis.ok_or_else(|| self.0.misunderstood("wal_sender_timeout is not a number"))?;
        Ok((millis > 0).then(|| Duration::from_millis(millis)))
    }

    /// Begins to stream `publication`'s changes from `slot`; the connection then belongs to the stream.
    pub(crate) async fn start_replication(
        self,
        slot: &str,
        publication: &str,
        from: Lsn,
    ) -> Result<Streaming, ConnectionError> {
        let publication = literal(&identifier(publication));
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {from} (proto_version '1', publication_names {publication}, messages 'true')",
            identifier(slot)
        );
        let mut session = self.0;
        session.send_query(&command).await?;
        loop {
            session.fill_message().await?;
            if session.input.first() == Some(&COPY_BOTH) {
                let length = message_length(&session.input).unwrap_or(0);
                let _ = session.input.split_to(length);
                let Session { socket, input, server, .. } = session;
                return Ok(Streaming { socket, input, server });
            }
            match session.receive().await? {
                Message::NoticeResponse(_) | Message::ParameterStatus(_) => {}
                _ => return Err(session.misunderstood("START_REPLICATION was not answered by a copy")),
            }
        }
    }
}

/// A connection that streams: the socket, and what has been read of it.
pub(crate) struct Streaming {
    pub(crate) socket: Box<dyn Socket>,
    pub(crate) input: BytesMut,
    pub(crate) server: String,
}

fn text(value: Option<&Option<Bytes>>) -> Option<&str> {
    std::str::from_utf8(value?.as_ref()?).ok()
}

/// Reads a history file: a line `timeline <tab> LSN <tab> reason` for each ancestor, the LSN being where it was left.
fn switch_point(history: &str, ancestor: u32) -> Result<Option<Lsn>, &str> {
    for line in history.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let mut words = line.split_whitespace();
        let timeline: u32 = words.next().and_then(|word| word.parse().ok()).ok_or(line)?;
        let lsn: Lsn = words.next().and_then(|word| word.parse().ok()).ok_or(line)?;
        if timeline == ancestor {
            return Ok(Some(lsn));
        }
    }
    Ok(None)
}

/// An SQL identifier, quoted.
pub(crate) fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// An SQL string, quoted.
fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h05_switch_points_are_read_from_the_history() {
        let history = "1\t0/3000148\tno recovery target specified\n\n2\t0/5000000\tbefore 2020-01-01\n";
        assert_eq!(switch_point(history, 1), Ok(Some(Lsn(0x300_0148))));
        assert_eq!(switch_point(history, 2), Ok(Some(Lsn(0x500_0000))));
        assert_eq!(switch_point(history, 3), Ok(None));
        assert_eq!(switch_point("one 0/1", 1), Err("one 0/1"));
    }
}
