//! What must hold of the slot before a reader may stream, and the refusal when it does not.
//!
//! Going on with a slot that skipped something would lose changes in silence; so everything here is read from the catalog,
//! judged by a plain function, and refused with the remedy.

use change::{Lsn, NEW_LOG, Refusal};
use tokio_postgres::{Client, Error, Row};

const SLOT: &str = "
SELECT s.slot_type, s.plugin::text, s.database::text, pg_catalog.current_database()::text, s.temporary, s.active,
       s.confirmed_flush_lsn::text, s.wal_status,
       coalesce((pg_catalog.to_jsonb(s) ->> 'two_phase')::boolean, false),
       pg_catalog.to_jsonb(s) ->> 'invalidation_reason'
FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1";

/// A row of `pg_replication_slots`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Slot {
    slot_type: String,
    plugin: Option<String>,
    database: Option<String>,
    our_database: String,
    temporary: bool,
    wal_status: Option<String>,
    two_phase: bool,
    invalidation_reason: Option<String>,
    confirmed_flush: Option<Lsn>,
    /// Whether a session streams from it.
    pub(crate) active: bool,
}

impl Slot {
    /// Reads it; `None` when there is no such slot.
    pub(crate) async fn read(client: &Client, name: &str) -> Result<Option<Slot>, Error> {
        client.query_opt(SLOT, &[&name]).await?.as_ref().map(Slot::from_row).transpose()
    }

    fn from_row(row: &Row) -> Result<Slot, Error> {
        let confirmed: Option<&str> = row.try_get(6)?;
        Ok(Slot {
            slot_type: row.try_get(0)?,
            plugin: row.try_get(1)?,
            database: row.try_get(2)?,
            our_database: row.try_get(3)?,
            temporary: row.try_get(4)?,
            active: row.try_get(5)?,
            confirmed_flush: confirmed.and_then(|text| text.parse().ok()),
            wal_status: row.try_get(7)?,
            two_phase: row.try_get(8)?,
            invalidation_reason: row.try_get(9)?,
        })
    }
}

/// Judges a slot; gives its `confirmed_flush_lsn` when a reader may use it.
pub(crate) fn usable(name: &str, slot: Option<&Slot>) -> Result<Lsn, Refusal> {
    let refused = |what: String| Err(Refusal::new(format!("slot \"{name}\" {what}"), NEW_LOG));
    let Some(slot) = slot else {
        return refused("does not exist: what was committed since its end is not in the log".into());
    };
    if slot.slot_type != "logical" || slot.plugin.as_deref() != Some("pgoutput") {
        let plugin = slot.plugin.as_deref().unwrap_or("none");
        return refused(format!(
            "is a {} slot with plugin {plugin}, not a logical one of pgoutput",
            slot.slot_type
        ));
    }
    if slot.database.as_ref() != Some(&slot.our_database) {
        let database = slot.database.as_deref().unwrap_or("none");
        return refused(format!("belongs to database \"{database}\", not to \"{}\"", slot.our_database));
    }
    if slot.temporary {
        return refused("is temporary: it ends with the session that made it".into());
    }
    if slot.two_phase {
        return refused(
            "has two_phase on: a transaction prepared before a restart would be lost at its commit".into(),
        );
    }
    if let Some(reason) = &slot.invalidation_reason {
        return refused(format!("was invalidated ({reason})"));
    }
    match slot.confirmed_flush {
        _ if slot.wal_status.as_deref() == Some("lost") => {
            refused("was invalidated: the WAL it needs has been removed (max_slot_wal_keep_size)".into())
        }
        None => refused("has no confirmed_flush_lsn: it was not completely made, or was invalidated".into()),
        Some(lsn) => Ok(lsn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_slot_of_ours_is_used() {
        let good = Slot {
            slot_type: "logical".into(),
            plugin: Some("pgoutput".into()),
            database: Some("app".into()),
            our_database: "app".into(),
            temporary: false,
            wal_status: Some("reserved".into()),
            two_phase: false,
            invalidation_reason: None,
            confirmed_flush: Some(Lsn(7)),
            active: true,
        };
        assert_eq!(usable("s", Some(&good)), Ok(Lsn(7)));
        assert!(usable("s", None).is_err());
        let bad = |damage: fn(&mut Slot)| {
            let mut slot = good.clone();
            damage(&mut slot);
            usable("s", Some(&slot)).expect_err("refused").what
        };
        assert!(bad(|s| s.plugin = Some("wal2json".into())).contains("plugin wal2json"));
        assert!(bad(|s| s.slot_type = "physical".into()).contains("physical"));
        assert!(bad(|s| s.database = Some("other".into())).contains("\"other\""));
        assert!(bad(|s| s.temporary = true).contains("temporary"));
        assert!(bad(|s| s.two_phase = true).contains("two_phase"));
        assert!(bad(|s| s.wal_status = Some("lost".into())).contains("removed"));
        assert!(bad(|s| s.invalidation_reason = Some("wal_removed".into())).contains("(wal_removed)"));
        assert!(bad(|s| s.confirmed_flush = None).contains("confirmed_flush"));
    }
}
