//! Enums and composite types that the rows of published tables are made of.
//!
//! The text of such a value depends on its type's catalog rows: a label that is renamed, an attribute that is added changes
//! the text of every row. The server describes a table again when the table was altered, but not when a type of its columns
//! was. So before rows of such tables are taken in, the types are looked at: once for each piece of the stream that holds
//! some, after it has come. A table whose types have changed is announced again before its next row, and the relay compares
//! what its rows mean.

use std::collections::{BTreeSet, HashMap};

use change::TypeDescription;
use tokio_postgres::{Client, Error, Statement};

use crate::catalog;
use crate::stream::Frame;
use crate::watch;

/// Whether a transaction that changes a type holds its lock, and may have committed without being visible: only one that
/// waits for a synchronous standby takes longer for that than its changes take to us.
const HELD: &str = "
SELECT EXISTS (
    SELECT FROM pg_catalog.pg_locks l LEFT JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid
    LEFT JOIN pg_catalog.pg_class c ON c.oid = l.relation
    WHERE l.granted AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())
      AND (l.locktype = 'object' AND l.classid = 'pg_catalog.pg_type'::regclass AND l.mode IN ('ExclusiveLock', 'AccessExclusiveLock')
           OR l.locktype = 'relation' AND c.relkind = 'c' AND l.mode = 'AccessExclusiveLock')
      AND (a.wait_event = 'SyncRep' OR a.state IS NULL AND ENDS))
   AND pg_catalog.current_setting('synchronous_standby_names') <> ''";

/// What is known of the types, and what is asked.
pub(crate) struct Types {
    known: HashMap<u32, Vec<TypeDescription>>,
    /// Tables to announce again.
    suspects: BTreeSet<u32>,
    held: Statement,
    of_tables: Statement,
}

impl Types {
    pub(crate) async fn prepare(client: &Client) -> Result<Self, Error> {
        Ok(Types {
            known: HashMap::new(),
            suspects: BTreeSet::new(),
            held: client.prepare(&HELD.replace("ENDS", watch::ENDS)).await?,
            of_tables: client.prepare(&catalog::types_of_tables()).await?,
        })
    }

    /// Takes note of a table's types.
    pub(crate) fn note(&mut self, relation: u32, types: &[TypeDescription]) {
        if types.is_empty() {
            self.known.remove(&relation);
        } else {
            self.known.insert(relation, types.to_vec());
        }
    }

    pub(crate) fn has(&self, relation: u32) -> bool {
        !self.known.is_empty() && self.known.contains_key(&relation)
    }

    /// The tables with such types of which these messages hold rows.
    pub(crate) fn touched<'a>(&self, frames: impl Iterator<Item = Frame<'a>>) -> Vec<u32> {
        let mut touched = Vec::new();
        if self.known.is_empty() {
            return touched;
        }
        for frame in frames {
            let Frame::Data { payload: [b'I' | b'U' | b'D', a, b, c, d, ..], .. } = frame else { continue };
            let relation = u32::from_be_bytes([*a, *b, *c, *d]);
            if self.known.contains_key(&relation) && !touched.contains(&relation) {
                touched.push(relation);
            }
        }
        touched
    }

    /// Whether one of them may have been changed by a transaction that is not visible yet.
    pub(crate) async fn held(&self, client: &Client) -> Result<bool, Error> {
        client.query_one(&self.held, &[]).await?.try_get(0)
    }

    /// Those of the tables whose types are not what they were. Locks are looked at first: who has let go of one is visible.
    pub(crate) async fn changed(&self, client: &Client, tables: &[u32]) -> Result<Vec<u32>, Error> {
        if self.held(client).await? {
            return Ok(tables.to_vec());
        }
        let rows = client.query(&self.of_tables, &[&tables]).await?;
        let mut changed = Vec::new();
        for (relation, row) in tables.iter().zip(&rows) {
            let types: Result<Vec<TypeDescription>, _> = serde_json::from_str(row.try_get(0)?);
            if types.ok().as_ref() != self.known.get(relation) {
                changed.push(*relation);
            }
        }
        Ok(changed)
    }

    pub(crate) fn suspect(&mut self, tables: Vec<u32>) {
        self.suspects.extend(tables);
    }

    /// Whether the table is to be announced again; says so once.
    pub(crate) fn suspected(&mut self, relation: u32) -> bool {
        !self.suspects.is_empty() && self.suspects.remove(&relation)
    }
}
