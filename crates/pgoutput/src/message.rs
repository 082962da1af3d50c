use change::{Lsn, ReplicaIdentity, Tuple};

use crate::DecodeError;
use crate::reader::Reader;

/// One message of pgoutput version 1.
#[derive(Clone, PartialEq, Debug)]
pub enum Message<'a> {
    /// `B`: a committed transaction begins.
    Begin {
        /// LSN of its commit record.
        commit_lsn: Lsn,
        /// When it committed, microseconds since the Unix epoch.
        commit_time_us: i64,
        /// Its top-level transaction id.
        xid: u32,
    },
    /// `C`: the transaction is complete.
    Commit {
        /// LSN of its commit record, as in the `Begin`.
        commit_lsn: Lsn,
        /// LSN after its commit record.
        end_lsn: Lsn,
        /// When it committed, microseconds since the Unix epoch.
        commit_time_us: i64,
    },
    /// `O`: the transaction was replicated from elsewhere.
    Origin {
        /// LSN of its commit there.
        commit_lsn: Lsn,
        /// Name of the replication origin.
        name: &'a str,
    },
    /// `R`: what a relation looks like from here on.
    Relation(Relation<'a>),
    /// `Y`: the name of a type that is not built in.
    Type {
        /// Its object id.
        oid: u32,
        /// Its schema; empty means `pg_catalog`.
        namespace: &'a str,
        /// Its name.
        name: &'a str,
    },
    /// `I`: a row was inserted.
    Insert {
        /// Object id of the relation.
        relation: u32,
        /// The new row.
        new: Tuple<'a>,
    },
    /// `U`: a row was updated.
    Update {
        /// Object id of the relation.
        relation: u32,
        /// As much of the old row as the replica identity has, where the server sent it.
        old: Option<OldTuple<'a>>,
        /// The new row.
        new: Tuple<'a>,
    },
    /// `D`: a row was deleted.
    Delete {
        /// Object id of the relation.
        relation: u32,
        /// As much of the old row as the replica identity has.
        old: OldTuple<'a>,
    },
    /// `T`: relations were truncated by one statement.
    Truncate {
        /// Whether CASCADE was said.
        cascade: bool,
        /// Whether RESTART IDENTITY was said.
        restart_identity: bool,
        /// Which relations.
        relations: RelationOids<'a>,
    },
    /// `M`: a logical message.
    Message {
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Its LSN.
        lsn: Lsn,
        /// Names whose message it is.
        prefix: &'a str,
        /// Anything.
        content: &'a [u8],
    },
}

/// What Postgres sends of an old row.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OldTuple<'a> {
    /// `K`: the replica identity's columns; every other column is padded with null.
    Key(Tuple<'a>),
    /// `O`: the whole row.
    Full(Tuple<'a>),
}

impl<'a> OldTuple<'a> {
    /// The row, whichever it is.
    pub fn tuple(self) -> Tuple<'a> {
        match self {
            OldTuple::Key(tuple) | OldTuple::Full(tuple) => tuple,
        }
    }
}

/// A relation as the stream announces it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relation<'a> {
    /// Its object id.
    pub oid: u32,
    /// Its schema; empty means `pg_catalog`.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// What an old row holds.
    pub identity: ReplicaIdentity,
    /// Its published columns.
    pub columns: Columns<'a>,
}

/// A column as the stream announces it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Column<'a> {
    /// Whether it belongs to the replica identity; under FULL every column does.
    pub key: bool,
    /// Its name.
    pub name: &'a str,
    /// Object id of its type; a domain's own.
    pub type_oid: u32,
    /// `pg_attribute.atttypmod`: -1 for none.
    pub type_modifier: i32,
}

/// The columns of a [`Relation`], in the order of its rows. Checked when made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Columns<'a> {
    count: u16,
    bytes: &'a [u8],
}

impl<'a> Columns<'a> {
    /// Number of columns.
    pub fn len(&self) -> usize {
        usize::from(self.count)
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The columns.
    pub fn iter(&self) -> impl Iterator<Item = Column<'a>> + use<'a> {
        let mut reader = Reader::new(b'R', self.bytes);
        (0..self.count).map_while(move |_| column(&mut reader).ok())
    }
}

/// Object ids of relations, as sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RelationOids<'a> {
    bytes: &'a [u8],
}

impl<'a> RelationOids<'a> {
    /// The object ids.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u32> + use<'a> {
        self.bytes.as_chunks::<4>().0.iter().map(|oid| u32::from_be_bytes(*oid))
    }
}

/// Reads one message.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let (tag, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
    let mut reader = Reader::new(*tag, rest);
    let message = match tag {
        b'I' => insert(&mut reader),
        b'U' => update(&mut reader),
        b'D' => delete(&mut reader),
        b'B' => begin(&mut reader),
        b'C' => commit(&mut reader),
        b'R' => relation(&mut reader),
        b'T' => truncate(&mut reader),
        b'M' => logical_message(&mut reader),
        b'O' => Ok(Message::Origin { commit_lsn: reader.lsn()?, name: reader.str()? }),
        b'Y' => Ok(Message::Type { oid: reader.u32()?, namespace: reader.str()?, name: reader.str()? }),
        other => Err(DecodeError::UnknownTag(*other)),
    }?;
    reader.end()?;
    Ok(message)
}

fn begin<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    Ok(Message::Begin { commit_lsn: reader.lsn()?, commit_time_us: reader.time()?, xid: reader.u32()? })
}

fn commit<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    match reader.u8()? {
        0 => {}
        flags => return reader.unknown("flags", flags),
    }
    Ok(Message::Commit { commit_lsn: reader.lsn()?, end_lsn: reader.lsn()?, commit_time_us: reader.time()? })
}

fn insert<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let relation = reader.u32()?;
    match reader.u8()? {
        b'N' => Ok(Message::Insert { relation, new: reader.tuple()? }),
        kind => reader.unknown("a row of kind", kind),
    }
}

fn update<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let relation = reader.u32()?;
    let mut kind = reader.u8()?;
    let old = match kind {
        b'K' => Some(OldTuple::Key(reader.tuple()?)),
        b'O' => Some(OldTuple::Full(reader.tuple()?)),
        _ => None,
    };
    if old.is_some() {
        kind = reader.u8()?;
    }
    match kind {
        b'N' => Ok(Message::Update { relation, old, new: reader.tuple()? }),
        kind => reader.unknown("a row of kind", kind),
    }
}

fn delete<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let relation = reader.u32()?;
    let old = match reader.u8()? {
        b'K' => OldTuple::Key(reader.tuple()?),
        b'O' => OldTuple::Full(reader.tuple()?),
        kind => return reader.unknown("a row of kind", kind),
    };
    Ok(Message::Delete { relation, old })
}

fn truncate<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let count = reader.u32()? as usize;
    let options = reader.u8()?;
    if options & !3 != 0 {
        return reader.unknown("options", options);
    }
    // A count whose bytes overflow is longer than any message.
    let bytes = reader.bytes(count.saturating_mul(4))?;
    Ok(Message::Truncate {
        cascade: options & 1 != 0,
        restart_identity: options & 2 != 0,
        relations: RelationOids { bytes },
    })
}

fn logical_message<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let transactional = match reader.u8()? {
        0 => false,
        1 => true,
        flags => return reader.unknown("flags", flags),
    };
    let (lsn, prefix) = (reader.lsn()?, reader.str()?);
    let length = reader.u32()? as usize;
    Ok(Message::Message { transactional, lsn, prefix, content: reader.bytes(length)? })
}

fn relation<'a>(reader: &mut Reader<'a>) -> Result<Message<'a>, DecodeError> {
    let (oid, namespace, name) = (reader.u32()?, reader.str()?, reader.str()?);
    let identity = match reader.u8()? {
        b'd' => ReplicaIdentity::Default,
        b'n' => ReplicaIdentity::Nothing,
        b'f' => ReplicaIdentity::Full,
        b'i' => ReplicaIdentity::Index,
        other => return reader.unknown("a replica identity", other),
    };
    let count = reader.u16()?;
    let bytes = reader.rest();
    for _ in 0..count {
        column(reader)?;
    }
    let bytes = &bytes[..bytes.len() - reader.rest().len()];
    Ok(Message::Relation(Relation { oid, namespace, name, identity, columns: Columns { count, bytes } }))
}

fn column<'a>(reader: &mut Reader<'a>) -> Result<Column<'a>, DecodeError> {
    let key = match reader.u8()? {
        0 => false,
        1 => true,
        flags => return reader.unknown("column flags", flags),
    };
    Ok(Column { key, name: reader.str()?, type_oid: reader.u32()?, type_modifier: reader.i32()? })
}
