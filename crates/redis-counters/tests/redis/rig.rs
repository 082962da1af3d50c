//! A sink, a Redis, and the worker's part played by hand.

use std::collections::BTreeMap;
use std::sync::Arc;

use change::{Collation, Column, Event, Kind, Lsn, Op, Position, Refusal, ReplicaIdentity, TableSchema};
use redis_counters::sql::Definition;
use redis_counters::{Bounds, CountersSink, Namespace, Server};
use testkit::services::Redis;
use worker::{Change, Checkpoint, Move, Sink, SinkError, Stored};

/// A mail: `None` is NULL.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Mail {
    pub(crate) id: i64,
    pub(crate) owner: Option<i64>,
    pub(crate) folder: Option<String>,
    pub(crate) is_read: Option<bool>,
    pub(crate) size: Option<i64>,
}

pub(crate) fn mail(id: i64, owner: i64, size: impl Into<Option<i64>>) -> Mail {
    Mail { id, owner: Some(owner), folder: Some("inbox".into()), is_read: Some(false), size: size.into() }
}

impl Mail {
    pub(crate) fn json(&self) -> String {
        let Mail { id, owner, folder, is_read, size } = self;
        let row = serde_json::json!({
            "id": id, "user_id": owner, "folder": folder, "is_read": is_read, "size": size
        });
        row.to_string()
    }
}

pub(crate) fn schema(identity: ReplicaIdentity) -> Arc<TableSchema> {
    let bytes = Collation { name: "C".into(), deterministic: true, bytewise: true };
    let column = |name: &str, type_oid, type_name: &str, key, collation| Column {
        name: name.into(),
        type_oid,
        type_name: type_name.into(),
        key,
        collation,
        number: None,
        recorded: None,
    };
    Arc::new(TableSchema {
        relation: 16384,
        root: None,
        schema: "public".into(),
        table: "emails".into(),
        identity,
        columns: vec![
            column("id", 20, "bigint", Some(1), None),
            column("user_id", 20, "bigint", None, None),
            column("folder", 25, "text", None, Some(bytes)),
            column("is_read", 16, "boolean", None, None),
            column("size", 20, "bigint", None, None),
        ],
    })
}

/// The queries of the tests, by the counter's name.
pub(crate) const COUNTERS: &[(&str, &str)] = &[
    ("unread", "SELECT user_id, count(*) FROM public.emails WHERE NOT is_read GROUP BY user_id"),
    ("sized", "SELECT user_id, count(size) FROM public.emails GROUP BY user_id"),
    ("bytes", "SELECT user_id, sum(size) FROM public.emails GROUP BY user_id"),
    ("folders", "SELECT folder, user_id, sum(size) FROM public.emails GROUP BY folder, user_id"),
    ("all", "SELECT count(*) FROM public.emails"),
    ("all_sized", "SELECT count(size) FROM public.emails"),
    ("all_bytes", "SELECT sum(size) FROM public.emails WHERE NOT is_read"),
];

pub(crate) fn definitions(names: &[&str]) -> Vec<Definition> {
    let wanted = |name: &&str| {
        let (name, sql) = COUNTERS.iter().find(|(known, _)| known == name).unwrap();
        Definition::parse(name, sql).unwrap()
    };
    names.iter().map(wanted).collect()
}

pub(crate) const NAMES: [&str; 7] = ["unread", "sized", "bytes", "folders", "all", "all_sized", "all_bytes"];

/// A worker's stand-in: keeps the checkpoints, numbers the changes.
pub(crate) struct Rig {
    pub(crate) sink: CountersSink,
    pub(crate) at: Vec<Checkpoint>,
    pub(crate) offset: i64,
    schema: Arc<TableSchema>,
}

pub(crate) fn sink(url: &str, space: Namespace, bounds: Bounds, names: &[&str]) -> CountersSink {
    let mut server = Server::new(url);
    server.response_timeout = std::time::Duration::from_secs(5);
    CountersSink::new(&server, space, bounds, definitions(names)).unwrap()
}

impl Rig {
    /// Counters of these names in pipeline `p`, loaded and, where empty or damaged, reset.
    pub(crate) fn start(redis: &Redis, names: &[&str]) -> Rig {
        Self::with(redis, names, Bounds::default())
    }

    pub(crate) fn with(redis: &Redis, names: &[&str], bounds: Bounds) -> Rig {
        let mut rig = Self::over(sink(&redis.url(), Namespace::new("", "p"), bounds, names));
        rig.load().unwrap();
        rig
    }

    pub(crate) fn over(sink: CountersSink) -> Rig {
        Rig { sink, at: Vec::new(), offset: 1, schema: schema(ReplicaIdentity::Full) }
    }

    pub(crate) fn beginning(&self, place: usize) -> Checkpoint {
        Checkpoint {
            log: "log-1".into(),
            generation: 1,
            next_offset: 1,
            lsn: Lsn(1),
            definition: self.sink.stores()[place].definition.clone(),
            ready: false,
            skipped: Vec::new(),
            last: None,
            stopped: None,
        }
    }

    /// What a worker does after an error: gives what was found.
    pub(crate) fn load(&mut self) -> Result<Vec<Stored>, SinkError> {
        let found = self.sink.load()?;
        self.at.clear();
        for (place, stored) in found.iter().enumerate() {
            let checkpoint = match stored {
                Stored::At(checkpoint) => checkpoint.clone(),
                _ => {
                    let beginning = self.beginning(place);
                    self.sink.reset(place, &beginning)?;
                    beginning
                }
            };
            self.at.push(checkpoint);
        }
        Ok(found)
    }

    pub(crate) fn change(
        &mut self,
        op: Op,
        before: Option<&Mail>,
        after: Option<&Mail>,
    ) -> Result<(), SinkError> {
        let (before, after) = (before.map(Mail::json), after.map(Mail::json));
        let schema = self.schema.clone();
        self.raw(&schema, op, before.as_deref(), after.as_deref())
    }

    pub(crate) fn raw(
        &mut self,
        schema: &Arc<TableSchema>,
        op: Op,
        before: Option<&str>,
        after: Option<&str>,
    ) -> Result<(), SinkError> {
        let change = Change {
            offset: self.offset,
            position: Position { lsn: Lsn(self.offset as u64 + 1), kind: Kind::Transaction, ordinal: 0 },
            schema,
            key: b"{}",
            event: Event { op, before, after },
            unchanged: b"",
            omitted: b"",
            previous_key: b"",
        };
        self.offset += 1;
        let stores = 0..self.sink.stores().len();
        let wanted: Vec<usize> = stores.filter(|store| self.sink.wants(*store, schema)).collect();
        wanted.into_iter().try_for_each(|store| self.sink.apply(store, &change))
    }

    pub(crate) fn insert(&mut self, mail: &Mail) {
        self.change(Op::Create, None, Some(mail)).unwrap();
    }

    pub(crate) fn delete(&mut self, mail: &Mail) {
        self.change(Op::Delete, Some(mail), None).unwrap();
    }

    /// Every counter moves to where the changes have come.
    pub(crate) fn moves(&self) -> Vec<Option<Move>> {
        let step = |from: &Checkpoint| {
            let to = Checkpoint {
                next_offset: self.offset,
                lsn: Lsn(self.offset as u64),
                ready: true,
                skipped: Vec::new(),
                ..from.clone()
            };
            Some(Move { from: from.clone(), to })
        };
        self.at.iter().map(step).collect()
    }

    pub(crate) fn commit(&mut self) -> Result<(), SinkError> {
        let moves = self.moves();
        self.sink.commit(&moves)?;
        self.at = moves.into_iter().flatten().map(|step| step.to).collect();
        Ok(())
    }
}

/// A hash as any client sees it.
pub(crate) fn hash(redis: &Redis, key: &str) -> BTreeMap<String, String> {
    redis::cmd("HGETALL").arg(key).query(&mut redis.connect()).unwrap()
}

pub(crate) fn text(redis: &Redis, key: &str) -> Option<String> {
    redis::cmd("GET").arg(key).query(&mut redis.connect()).unwrap()
}

pub(crate) fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(group, value)| (group.to_string(), value.to_string())).collect()
}

/// Every key with its type and content, as DUMP prints it.
pub(crate) fn everything(redis: &Redis) -> BTreeMap<String, Vec<u8>> {
    let mut connection = redis.connect();
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut connection).unwrap();
    let mut dump = |key: &String| redis::cmd("DUMP").arg(key).query(&mut connection).unwrap();
    keys.iter().map(|key| (key.clone(), dump(key))).collect()
}

pub(crate) fn run(redis: &Redis, command: &str) {
    let mut parts = command.split(' ');
    let mut call = redis::cmd(parts.next().unwrap());
    for part in parts {
        call.arg(part);
    }
    call.exec(&mut redis.connect()).unwrap();
}

/// Why the first store is refused.
pub(crate) fn refusal(stored: &[Stored]) -> &Refusal {
    match &stored[0] {
        Stored::Refused { refusal, .. } => refusal,
        other => panic!("{other:?}"),
    }
}
