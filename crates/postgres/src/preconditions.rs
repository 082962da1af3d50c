//! What must hold of slot and publication before a reader may stream, and the refusal when it does not.
//!
//! Going on with a slot that skipped something, or a publication that leaves something out, would lose changes in
//! silence; so everything here is read from the catalog, judged by a plain function, and refused with the remedy.

use change::{Lsn, NEW_LOG, Refusal};
use tokio_postgres::{Client, Error, Row};

const SLOT: &str = "
SELECT s.slot_type, s.plugin::text, s.database::text, pg_catalog.current_database()::text, s.temporary, s.active,
       s.confirmed_flush_lsn::text, s.wal_status,
       coalesce((to_jsonb(s) ->> 'two_phase')::boolean, false),
       to_jsonb(s) ->> 'invalidation_reason'
FROM pg_catalog.pg_replication_slots s WHERE s.slot_name = $1";

const PUBLICATION: &str = "
SELECT p.puballtables, p.pubinsert AND p.pubupdate AND p.pubdelete AND p.pubtruncate
FROM pg_catalog.pg_publication p WHERE p.pubname = $1";

/// For each table ($2 schemas, $3 names): whether it exists, and whether publication $1 lists its oid.
const TABLES: &str = "
SELECT g.schema || '.' || g.name, r.oid IS NOT NULL,
       EXISTS (SELECT FROM pg_catalog.pg_publication_rel pr
               JOIN pg_catalog.pg_publication p ON p.oid = pr.prpubid
               WHERE p.pubname = $1 AND pr.prrelid = r.oid)
FROM unnest($2::text[], $3::text[]) AS g (schema, name)
LEFT JOIN pg_catalog.pg_namespace n ON n.nspname = g.schema
LEFT JOIN pg_catalog.pg_class r ON r.relnamespace = n.oid AND r.relname = g.name AND r.relkind IN ('r', 'p')";

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

/// Compares the publication with the configured tables, by oid: a table that was dropped and made again under its
/// name is another table.
pub(crate) async fn publication(
    client: &Client,
    publication: &str,
    tables: &[String],
) -> Result<Result<(), Refusal>, Error> {
    let remedy = "run `millrace setup`";
    let Some(row) = client.query_opt(PUBLICATION, &[&publication]).await? else {
        return Ok(Err(Refusal::new(format!("publication \"{publication}\" does not exist"), remedy)));
    };
    let (all_tables, all_changes): (bool, bool) = (row.try_get(0)?, row.try_get(1)?);
    if !all_changes {
        let what = format!("publication \"{publication}\" does not publish all kinds of changes");
        let remedy = format!(
            "ALTER PUBLICATION \"{publication}\" SET (publish = 'insert, update, delete, truncate'); what was not \
             published meanwhile is lost to this log: {NEW_LOG}"
        );
        return Ok(Err(Refusal::new(what, remedy)));
    }
    let split = |table: &String| match table.split_once('.') {
        Some((schema, name)) => (schema.to_owned(), name.to_owned()),
        None => ("public".to_owned(), table.clone()),
    };
    let (schemas, names): (Vec<String>, Vec<String>) = tables.iter().map(split).unzip();
    for row in client.query(TABLES, &[&publication, &schemas, &names]).await? {
        let (table, exists, listed): (String, bool, bool) =
            (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
        let what = match (exists, listed || all_tables) {
            (true, true) => continue,
            (true, false) => format!("table {table} is not in publication \"{publication}\""),
            (false, _) => format!("table {table} does not exist"),
        };
        return Ok(Err(Refusal::new(what, remedy)));
    }
    Ok(Ok(()))
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
