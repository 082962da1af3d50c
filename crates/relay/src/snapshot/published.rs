//! Compares the published tables with the known ones, at each look at the catalog and at each Relation message. Decides
//! which tables are added, begin again, leave, or are not to be trusted.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use change::{Description, Lsn, NEW_LOG, Read, Refusal, Snapshot, TableProgress, TableSchema};

use super::{Effect, Reading, begun};
use crate::{Described, Publication, PublishedTable};

/// Why a table that is published as `found` begins again. Refuses one that has another name than its rows in the log.
fn why_again(known: &TableProgress, found: &PublishedTable, xmin: u32) -> Result<Option<String>, Refusal> {
    if known.publication == 0 {
        return Ok(known.breaks(&found.description));
    }
    if known.publication != found.publication {
        let why = match found.root {
            None => "it was taken out of the publication and put back",
            Some(_) => "a partition was attached again, or is published by itself",
        };
        return Ok(Some(why.to_owned()));
    }
    if known.name != found.name {
        let what = format!(
            "table {} has the name {} now, and its rows in the log have the old one",
            known.name, found.name
        );
        let remedy = format!("rename it back, or correct `postgres.tables` and {NEW_LOG}");
        return Err(Refusal::new(what, remedy));
    }
    if known.publication_xmin != 0 && known.publication_xmin != xmin {
        return Ok(Some(
            "the publication was altered, and what it left out meanwhile is not known".to_owned(),
        ));
    }
    Ok(known.breaks(&found.description))
}

impl Reading {
    /// Compares what is published with what is known. Unless the stream is `between` two transactions only new tables are
    /// taken in: the rest of a split one goes on as it began, and what is to be refused is so at the next look.
    ///
    /// Returns whether no store is to be ready before the log has passed this look; or why the reader has to end, and the
    /// tables that this concerns.
    pub(crate) fn reconcile(
        &mut self,
        look: &Publication,
        between: bool,
    ) -> Result<bool, (Refusal, Vec<u32>)> {
        let mut refused = look.unfit.clone().filter(|_| between);
        let mut concerned: Vec<u32> = Vec::new();
        if refused.is_some() {
            concerned.extend(self.there());
        }
        for found in look.tables.iter().filter(|_| look.unfit.is_none()) {
            if let Err(refusal) = self.take_in(found, look.xmin, between) {
                concerned.push(found.relation);
                refused.get_or_insert(refusal);
            }
        }
        if let Some(refusal) = refused {
            // The reader commits before it ends, and the ledger then needs the other changes that this look found.
            self.settle(None);
            return Err((refusal, concerned));
        }
        let mut awaited = false;
        if between {
            let leaving = !self.leaving.is_empty();
            self.note_absent(look);
            awaited = (look.settled && self.trust(look.until)) || (!leaving && !self.leaving.is_empty());
            self.settle(None);
        }
        self.note_active();
        Ok(awaited)
    }

    /// Changes of these tables may be missing from the log. Their stores become not ready, until the log has passed the
    /// first look that is not refused.
    pub(crate) fn distrust(&mut self, concerned: &[u32]) {
        for relation in concerned {
            self.gaps.entry(*relation).or_insert(false);
        }
        self.distrusted = Some(Lsn(u64::MAX));
        self.dirty = true;
    }

    /// The same of every table.
    pub(crate) fn distrust_all(&mut self) {
        self.distrust(&self.there());
    }

    /// Returns true while all stores are marked not ready: until a look finds no fault.
    pub(crate) fn distrusts(&self) -> bool {
        self.distrusted == Some(Lsn(u64::MAX))
    }

    /// The tables that have not left the log.
    fn there(&self) -> Vec<u32> {
        let there = self.tables.iter().filter(|(_, table)| table.read != Read::Removed);
        there.map(|(relation, _)| *relation).collect()
    }

    /// The log is right from `until` on. Returns whether it was not to be trusted before.
    fn trust(&mut self, until: Lsn) -> bool {
        let distrusted = self.distrusted.as_mut().filter(|distrusted| **distrusted == Lsn(u64::MAX));
        distrusted.map(|distrusted| *distrusted = until).is_some()
    }

    /// The log has come to this LSN.
    pub(crate) fn came_to(&mut self, log_lsn: Lsn) {
        if self.distrusted.is_some_and(|until| until <= log_lsn) {
            self.distrusted = None;
            self.dirty = true;
        }
    }

    fn take_in(&mut self, found: &PublishedTable, xmin: u32, between: bool) -> Result<(), Refusal> {
        let PublishedTable { relation, root, publication, estimated_rows, description, .. } = found;
        let begin = |stale| TableProgress {
            root: *root,
            estimated_rows: *estimated_rows,
            description: Some(Box::new(description.clone())),
            publication_xmin: xmin,
            stale,
            ..TableProgress::new(found.name.clone(), *publication, Read::Nothing)
        };
        // The rows of a detached partition have ended in the log, together with all of its root's rows.
        let ended = root.is_some() && self.family(root.unwrap_or(*relation)).next().is_some();
        // A table that has become a partition is another one in the log, where nothing has its old name any more.
        let other = |known: &TableProgress| {
            known.family(*relation) == *relation && root.is_some_and(|root| root != *relation)
        };
        let known = self.tables.get_mut(relation);
        if known.is_some() && !between {
            return Ok(());
        }
        let former_root = known.as_ref().and_then(|known| known.root).filter(|former| Some(*former) != *root);
        let why = match known.filter(|known| !other(known)) {
            None => {
                self.tables.insert(*relation, begin(false));
                self.note_unread(found);
                None
            }
            Some(known) if known.read == Read::Removed => {
                *known = begin(!ended);
                self.note_unread(found);
                None
            }
            Some(known) => {
                let why = why_again(known, found, xmin)?;
                let described = known.describe(description);
                let attached = (known.publication, known.root, known.publication_xmin);
                if why.is_none() && !described && attached == (*publication, *root, xmin) {
                    return Ok(());
                }
                // A transaction that runs may have lost changes too: the first round waits for it as for those before a `t`.
                known.stale |= why.is_some() && known.read == Read::Nothing;
                found.name.clone_into(&mut known.name);
                known.estimated_rows = *estimated_rows;
                (known.publication, known.root, known.publication_xmin) = (*publication, *root, xmin);
                why
            }
        };
        self.changed.insert(*relation);
        if let Some(why) = why {
            self.begin_again(*relation, 0, &why);
        }
        if let Some(former) = former_root.filter(|former| former != relation) {
            self.begin_again(former, 0, "a partition was detached or dropped");
        }
        Ok(())
    }

    /// Marks a gap for a new or returning partition that has rows: the log lacks them, and has those of its siblings.
    fn note_unread(&mut self, found: &PublishedTable) {
        if found.filled && self.has_others(found.relation, &[]) {
            self.gaps.entry(found.relation).or_insert(false);
        }
    }

    /// Marks tables that are not published any more. The look shows the present, and the stream is behind it: changes that
    /// were committed before a table left are still to come, up to the LSN read after the look. Until then the table is a
    /// gap, so that no store is ready.
    fn note_absent(&mut self, look: &Publication) {
        let published: BTreeSet<u32> = look.tables.iter().map(|found| found.relation).collect();
        self.leaving.retain(|relation, _| !published.contains(relation));
        // One that only the stream has told of may be published by a transaction that is not visible yet.
        let looked_at = |table: &TableProgress| table.publication != 0 || self.republished.is_empty();
        let known = self.tables.iter().filter(|(_, table)| table.read != Read::Removed && looked_at(table));
        let absent: Vec<u32> = known.map(|(relation, _)| *relation).collect();
        for relation in absent.into_iter().filter(|relation| !published.contains(relation)) {
            if let Entry::Vacant(leaving) = self.leaving.entry(relation) {
                leaving.insert(look.until);
                self.gaps.entry(relation).or_insert(false);
            }
        }
    }

    /// Removes the tables that have no further change after `end_lsn`, where the stream is. Returns those whose removal no
    /// event of the stream has shown.
    pub(crate) fn depart(&mut self, end_lsn: Lsn) -> Vec<u32> {
        let due: Vec<u32> = self
            .leaving
            .iter()
            .filter(|(_, until)| **until <= end_lsn)
            .map(|(relation, _)| *relation)
            .collect();
        let mut unsaid = Vec::new();
        let mut roots = BTreeSet::new();
        for relation in &due {
            let Some(table) = self.tables.get(relation).filter(|table| table.read != Read::Removed) else {
                continue;
            };
            match table.root.filter(|root| root != relation) {
                None => unsaid.push(*relation),
                // A partition was detached or dropped: of its rows no change tells.
                Some(root) if table.read != Read::Nothing && self.stays(root) => drop(roots.insert(root)),
                Some(_) => {}
            }
        }
        for relation in due {
            self.leaving.remove(&relation);
            if let Some(table) = self.tables.get_mut(&relation).filter(|table| table.read != Read::Removed) {
                table.stale |= table.root.is_some_and(|root| roots.contains(&root));
                self.reads_anew(relation, Read::Removed);
            }
            self.dirty = true;
        }
        roots.into_iter().for_each(|root| self.begin_again(root, 0, "a partition was detached or dropped"));
        self.settle(None);
        self.note_active();
        unsaid
    }

    /// The tables' names.
    pub(crate) fn names(&self) -> BTreeMap<u32, String> {
        self.tables.iter().map(|(relation, table)| (*relation, table.name.clone())).collect()
    }

    fn stays(&self, relation: u32) -> bool {
        let table = self.tables.get(&relation);
        table.is_some_and(|table| table.read != Read::Removed) && !self.leaving.contains_key(&relation)
    }

    /// The first LSN at which [`depart`](Self::depart) has something to do.
    pub(crate) fn next_departure(&self) -> Option<Lsn> {
        self.leaving.values().min().copied()
    }

    /// The table was taken out of the publication by a command of ours, in the open transaction: this row of
    /// `pg_publication_rel` is gone.
    pub(crate) fn withdrawn(&mut self, relation: u32, publication: u32, ordinal: u64) {
        if self.tables.get(&relation).is_some_and(|table| table.publication == publication) {
            self.ahead.insert(Effect::Withdrawn(relation), ordinal);
        }
    }

    /// The stream tells of a table, in this transaction, which it does when the table may have changed: it may have been
    /// published, put back, or altered.
    pub(crate) fn announced(&mut self, described: &Described, xid: u32) {
        self.republished.insert(xid);
        let TableSchema { relation, root, .. } = described.schema;
        if let Entry::Vacant(unknown) = self.tables.entry(relation) {
            let name = described.schema.full_name();
            unknown.insert(TableProgress { root, ..TableProgress::new(name, 0, Read::Nothing) });
            self.changed.insert(relation);
            if described.published.is_none() {
                // Which table it was a partition of is not known any more.
                let roots = self.tables.iter().filter(|(at, table)| table.root == Some(**at) && begun(table));
                let roots: Vec<u32> = roots.map(|(at, _)| *at).collect();
                self.gaps.extend(roots.into_iter().map(|root| (root, false)));
            }
            self.note_active();
        }
    }

    /// Why the table begins again with the open transaction, as it is published now; takes note of that. The server
    /// describes a table again when it or the publication was altered, so nothing that follows an ALTER is in the log before.
    pub(crate) fn compare(&mut self, described: &Described) -> Result<Option<String>, Refusal> {
        let relation = described.schema.relation;
        let again = self.begins_again(relation);
        let (Some(table), Some(found)) = (self.tables.get_mut(&relation), &described.published) else {
            return Ok(None);
        };
        if begun(table) && !again {
            let why = why_again(table, found, described.xmin)?;
            if why.is_some() {
                self.described_ahead.insert(relation, found.description.clone());
                return Ok(why);
            }
        }
        if table.describe(&found.description) {
            self.changed.insert(relation);
        }
        Ok(None)
    }

    /// Schema and name under which the log has a table, as far as the ledger has them apart.
    pub(crate) fn log_name(&self, relation: u32) -> Option<(String, String)> {
        let family = self.tables.get(&relation)?.family(relation);
        let Description { schema, table, .. } = self.tables.get(&family)?.description.as_deref()?;
        Some((schema.clone(), table.clone()))
    }

    /// These transactions may have changed the publication.
    pub(crate) fn republished(&mut self, xids: impl IntoIterator<Item = u32>) {
        self.republished.extend(xids);
    }

    /// Returns true while transactions that may have changed the publication are not visible.
    pub(crate) fn awaits_publication(&self) -> bool {
        !self.republished.is_empty()
    }

    /// Returns the tables for which a gap message is due, by the relation whose name their records have.
    pub(crate) fn new_gaps(&mut self) -> BTreeSet<u32> {
        let untold = self.gaps.iter_mut().filter(|(_, told)| !**told);
        let untold: Vec<u32> = untold.map(|(relation, told)| (*relation, *told = true).0).collect();
        untold.into_iter().map(|at| self.tables.get(&at).map_or(at, |table| table.family(at))).collect()
    }

    /// Returns true if a look or the stream has found something that is not in the log yet.
    pub(crate) fn has_something_to_say(&self, stream_lsn: Lsn) -> bool {
        self.has_stale()
            || self.gaps.values().any(|told| !told)
            || self.next_departure().is_some_and(|until| until <= stream_lsn)
    }

    /// Returns true if a transaction that may have changed the publication has become visible in this snapshot.
    pub(crate) fn sees_publication(&mut self, snapshot: &Snapshot) -> bool {
        let awaited = self.republished.len();
        self.republished.retain(|xid| !snapshot.saw(*xid));
        self.republished.len() < awaited
    }
}

#[cfg(test)]
mod tests {
    use change::{ColumnDescription, ReplicaIdentity};

    use super::*;
    use crate::Ledger;
    use crate::snapshot::{KeyOrder, Verdict};

    /// The log has its rows under its root's name. They end there, and the table is read again under its own name.
    #[test]
    fn h31_a_partition_that_is_published_by_itself_begins_again() {
        let known = |root| TableProgress {
            root,
            description: Some(Box::default()),
            ..TableProgress::new("public.root".into(), 1, Read::All)
        };
        let tables = [(5, known(Some(5))), (7, known(Some(5))), (8, known(Some(5)))].into();
        let mut reading = Reading::new(&Ledger { tables, ..Ledger::default() });
        let alone = PublishedTable {
            relation: 7,
            name: "public.leaf".into(),
            root: None,
            publication: 2,
            estimated_rows: -1,
            description: Description::default(),
            filled: true,
        };
        reading.reconcile(&look(vec![alone]), true).unwrap();
        let table = &reading.tables[&7];
        assert_eq!((&table.read, table.stale, table.root), (&Read::Nothing, true, None));
        assert_eq!(reading.depart(Lsn(100)), [5], "no event has shown it");
        assert_eq!(reading.tables[&8].read, Read::Removed);
    }

    fn look(tables: Vec<PublishedTable>) -> Publication {
        Publication { tables, unfit: None, xmin: 1, until: Lsn(100), settled: true }
    }

    fn plain(relation: u32) -> PublishedTable {
        PublishedTable {
            relation,
            name: format!("public.t{relation}"),
            root: None,
            publication: 1,
            estimated_rows: -1,
            description: Description::default(),
            filled: true,
        }
    }

    fn read(tables: impl IntoIterator<Item = (u32, Option<u32>)>) -> Reading {
        let known = |(relation, root)| {
            let table = TableProgress::new(format!("public.t{relation}"), 1, Read::All);
            (relation, TableProgress { root, description: Some(Box::default()), ..table })
        };
        let tables = tables.into_iter().map(known).collect();
        Reading::new(&Ledger { tables, ..Ledger::default() })
    }

    #[test]
    fn h29_what_was_committed_before_a_table_left_is_published() {
        let mut reading = read([(7, None), (8, None)]);
        reading.reconcile(&look(vec![plain(8)]), true).unwrap();
        let verdict = |reading: &Reading| reading.judge(7, &KeyOrder::default(), None, 700);
        assert_eq!(reading.depart(Lsn(99)), [0; 0]);
        assert_eq!(verdict(&reading), Some(Verdict::Publish));
        assert!(!reading.complete() && reading.new_gaps() == [7].into(), "and no store is shown meanwhile");
        assert_eq!(reading.depart(Lsn(100)), [7]);
        assert_eq!(verdict(&reading), Some(Verdict::LeaveOut));
        assert!(reading.complete());
    }

    #[test]
    fn h29_a_table_that_a_command_of_ours_takes_out_leaves_with_that_transaction() {
        let mut reading = read([(7, None)]);
        reading.reconcile(&look(vec![]), true).unwrap();
        reading.withdrawn(7, 2, 3);
        reading.settle(None);
        assert_eq!(reading.tables[&7].read, Read::All, "it was put back since");
        reading.withdrawn(7, 1, 3);
        reading.settle(Some(2));
        assert_eq!(reading.tables[&7].read, Read::All);
        reading.settle(None);
        assert_eq!(reading.tables[&7].read, Read::Removed);
        assert_eq!(reading.depart(Lsn(100)), [0; 0]);
    }

    #[test]
    fn h29_a_publication_that_was_altered_and_altered_back_reads_its_tables_again_once() {
        let mut reading = read([(7, None)]);
        reading.reconcile(&look(vec![plain(7)]), true).unwrap();
        assert!(reading.complete(), "an older ledger does not have it: it is taken note of");
        let altered = || Publication { xmin: 2, ..look(vec![plain(7)]) };
        reading.reconcile(&altered(), true).unwrap();
        assert!(reading.tables[&7].stale && !reading.complete());
        reading.end_stale(&"5:5:".parse().unwrap());
        reading.reconcile(&altered(), true).unwrap();
        assert!(!reading.tables[&7].stale);
    }

    #[test]
    fn a_table_that_has_another_name_now_is_refused() {
        let mut reading = read([(7, None)]);
        let renamed = PublishedTable { name: "public.t_old".into(), ..plain(7) };
        assert!(reading.reconcile(&look(vec![renamed.clone()]), false).is_ok(), "not within a transaction");
        let (refusal, concerned) = reading.reconcile(&look(vec![renamed, plain(8)]), true).unwrap_err();
        assert!(refusal.what.contains("public.t7 has the name public.t_old now"), "{refusal}");
        reading.distrust(&concerned);
        assert!(!reading.complete() && reading.new_gaps() == [7].into());
        let mut reading = Reading { distrusted: reading.progress().unwrap().distrusted, ..read([(7, None)]) };
        assert!(reading.reconcile(&look(vec![plain(7)]), true).unwrap(), "renamed back");
        reading.came_to(Lsn(99));
        assert!(!reading.complete());
        reading.came_to(Lsn(100));
        assert!(reading.complete() && reading.dirty());
    }

    #[test]
    fn h31_a_partition_that_is_published_by_itself_ends_the_rows_of_its_former_root() {
        let mut reading = read([(5, Some(5)), (7, Some(5)), (8, Some(5))]);
        let of = |relation, root| PublishedTable { root, ..plain(relation) };
        let look =
            look(vec![of(5, Some(5)), of(7, Some(5)), PublishedTable { publication: 2, ..of(8, None) }]);
        reading.reconcile(&look, true).unwrap();
        let pending = |relation: u32| reading.tables[&relation].read == Read::Nothing;
        assert!(pending(7) && pending(8), "{:?}", reading.tables);
    }

    #[test]
    fn h31_a_partition_with_rows_that_is_attached_is_a_gap_until_it_is_read() {
        let mut reading = read([(5, Some(5)), (7, Some(5))]);
        let of = |relation, filled| PublishedTable {
            name: "public.t5".into(),
            root: Some(5),
            filled,
            ..plain(relation)
        };
        let named = |mut table: PublishedTable, name: &str| {
            table.name = name.into();
            table
        };
        let known = || vec![named(of(5, true), "public.t5"), named(of(7, true), "public.t7")];
        reading.reconcile(&look([known(), vec![of(8, false)]].concat()), true).unwrap();
        assert!(reading.new_gaps().is_empty(), "it is empty");
        reading.reconcile(&look([known(), vec![of(8, false), of(9, true)]].concat()), true).unwrap();
        assert_eq!(reading.new_gaps(), [5].into());
        assert!(!reading.complete());
    }

    /// A worker names the columns of the new version by it. After a kill it must be seen again that the table begins again.
    #[test]
    fn h30_what_its_rows_mean_then_reaches_the_ledger_with_the_same_change() {
        let column =
            |number, name: &str| ColumnDescription { number, name: name.to_owned(), ..Default::default() };
        let named = |names: [&str; 2]| Description {
            columns: vec![column(1, names[0]), column(2, names[1])],
            ..Description::default()
        };
        let mut table = TableProgress::new("public.t7".into(), 1, Read::All);
        table.describe(&named(["a", "b"]));
        let mut reading = Reading::new(&Ledger { tables: [(7, table)].into(), ..Ledger::default() });
        let schema = TableSchema {
            relation: 7,
            root: None,
            schema: "public".into(),
            table: "t7".into(),
            identity: ReplicaIdentity::Full,
            columns: Vec::new(),
        };
        let swapped = PublishedTable { description: named(["b", "a"]), ..plain(7) };
        let described = Described { schema, outdated: false, published: Some(swapped), xmin: 0 };
        let why = reading.compare(&described).unwrap().unwrap();
        reading.begin_again(7, 3, &why);
        assert!(reading.ends(7, 6));
        for (settled, names) in [(5, ["a", "b"]), (6, ["b", "a"])] {
            reading.settle(Some(settled));
            assert_eq!(reading.tables[&7].description.as_deref(), Some(&named(names)));
        }
    }
}
