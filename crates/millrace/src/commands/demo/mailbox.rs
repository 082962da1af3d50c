//! What the application does to its mailbox, each of it one transaction of several statements.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Error, Transaction};

use super::text::Letter;

/// Who has a mailbox; a user's id is the place here, from 1.
pub(super) const USERS: [&str; 24] = [
    "ada",
    "alan",
    "barbara",
    "brian",
    "claude",
    "dennis",
    "donald",
    "edsger",
    "frances",
    "grace",
    "jean",
    "jim",
    "john",
    "katherine",
    "ken",
    "leslie",
    "margaret",
    "niklaus",
    "radia",
    "robin",
    "shafi",
    "tim",
    "tony",
    "whitfield",
];
/// Mails per transaction of the fill.
const FILL_BATCH: u32 = 500;

const INSERT: &str = "INSERT INTO public.emails (user_id, sender, folder, subject, body, is_read, sent_at) \
     VALUES ($1, $2, $3, $4, $5, $6, now() - make_interval(mins => $7))";

/// What a transaction came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Done {
    Committed,
    /// As was intended: nothing of it may ever be seen.
    RolledBack,
}

/// One connection of the application.
pub(super) struct Mailbox {
    client: Client,
    letters: Arc<Vec<Letter>>,
    dice: Dice,
}

impl Mailbox {
    pub(super) fn new(client: Client, letters: Arc<Vec<Letter>>) -> Self {
        Mailbox { client, letters, dice: Dice::new() }
    }

    /// Adds the users, and `mails` mails of the past year.
    pub(super) async fn fill(&mut self, mails: u32) -> anyhow::Result<()> {
        let transaction = self.client.transaction().await?;
        for (name, id) in USERS.iter().zip(1i64..) {
            let address = format!("{name}@example.org");
            let insert =
                "INSERT INTO public.users (id, name, email) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING";
            transaction.execute(insert, &[&id, name, &address]).await?;
        }
        transaction.commit().await?;
        let mut left = mails;
        while left > 0 {
            let batch = left.min(FILL_BATCH);
            let transaction = self.client.transaction().await?;
            let insert = transaction.prepare(INSERT).await?;
            for _ in 0..batch {
                let letter = self.dice.pick(&self.letters);
                let folder =
                    *self.dice.pick(&["inbox", "inbox", "inbox", "archive", "archive", "lists", "trash"]);
                let read = self.dice.below(10) < 6;
                let age_minutes = self.dice.below(365 * 24 * 60) as i32;
                let user = self.dice.user();
                let values: [&(dyn ToSql + Sync); 7] =
                    [&user, &letter.sender, &folder, &letter.subject, &letter.body, &read, &age_minutes];
                transaction.execute(&insert, &values).await?;
            }
            transaction.commit().await?;
            left -= batch;
        }
        Ok(())
    }

    /// One transaction, of a random kind; one in eight is rolled back at its end.
    pub(super) async fn something(&mut self) -> Result<Done, Error> {
        let Mailbox { client, letters, dice } = self;
        let transaction = client.transaction().await?;
        match dice.below(100) {
            0..=39 => arrive(&transaction, dice, letters).await?,
            40..=64 => read(&transaction, dice).await?,
            65..=76 => tidy_up(&transaction, dice).await?,
            77..=86 => delete(&transaction, dice).await?,
            87..=93 => hand_over(&transaction, dice).await?,
            _ => change_of_mind(&transaction, dice, letters).await?,
        }
        if dice.below(8) == 0 {
            transaction.rollback().await?;
            return Ok(Done::RolledBack);
        }
        transaction.commit().await?;
        Ok(Done::Committed)
    }
}

/// The same letter for one to three users, each of whom learns of it or none.
async fn arrive(transaction: &Transaction<'_>, dice: &mut Dice, letters: &[Letter]) -> Result<(), Error> {
    let letter = dice.pick(letters);
    for _ in 0..=dice.below(3) {
        let user = dice.user();
        let values: [&(dyn ToSql + Sync); 7] =
            [&user, &letter.sender, &"inbox", &letter.subject, &letter.body, &false, &0i32];
        transaction.execute(INSERT, &values).await?;
    }
    Ok(())
}

/// Up to three unread mails are read, the oldest first; now and then one is to be unread again.
async fn read(transaction: &Transaction<'_>, dice: &mut Dice) -> Result<(), Error> {
    let user = dice.user();
    let some = 1 + dice.below(3) as i64;
    let update = "UPDATE public.emails SET is_read = true WHERE id IN (SELECT id FROM public.emails WHERE user_id = $1 AND NOT is_read \
                  AND folder = 'inbox' ORDER BY sent_at LIMIT $2 FOR UPDATE SKIP LOCKED)";
    transaction.execute(update, &[&user, &some]).await?;
    if dice.below(4) == 0 {
        let update = "UPDATE public.emails SET is_read = false WHERE id IN (SELECT id FROM public.emails WHERE user_id = $1 AND is_read \
                      ORDER BY sent_at DESC LIMIT 1 FOR UPDATE SKIP LOCKED)";
        transaction.execute(update, &[&user]).await?;
    }
    Ok(())
}

/// Mails move between two folders.
async fn tidy_up(transaction: &Transaction<'_>, dice: &mut Dice) -> Result<(), Error> {
    let user = dice.user();
    let (from, to) =
        *dice.pick(&[("inbox", "archive"), ("inbox", "trash"), ("archive", "lists"), ("trash", "inbox")]);
    let update = "UPDATE public.emails SET folder = $3 WHERE id IN (SELECT id FROM public.emails WHERE user_id = $1 AND folder = $2 \
                  ORDER BY id LIMIT 3 FOR UPDATE SKIP LOCKED)";
    transaction.execute(update, &[&user, &from, &to]).await.map(drop)
}

/// The trash is emptied, a little.
async fn delete(transaction: &Transaction<'_>, dice: &mut Dice) -> Result<(), Error> {
    let user = dice.user();
    let delete = "DELETE FROM public.emails WHERE id IN (SELECT id FROM public.emails WHERE user_id = $1 AND folder = 'trash' \
                  ORDER BY id LIMIT 6 FOR UPDATE SKIP LOCKED)";
    transaction.execute(delete, &[&user]).await.map(drop)
}

/// Mails change their owner, and are news to the new one: a row that leaves one group of a counter for another.
async fn hand_over(transaction: &Transaction<'_>, dice: &mut Dice) -> Result<(), Error> {
    let (from, to) = (dice.user(), dice.user());
    let update = "UPDATE public.emails SET user_id = $2, is_read = false, subject = 'Fwd: ' || subject WHERE id IN \
                  (SELECT id FROM public.emails WHERE user_id = $1 AND folder = 'archive' AND subject NOT LIKE 'Fwd: %' \
                  ORDER BY id LIMIT 3 FOR UPDATE SKIP LOCKED)";
    transaction.execute(update, &[&from, &to]).await.map(drop)
}

/// Some of it is taken back before the commit, by savepoint.
async fn change_of_mind(
    transaction: &Transaction<'_>,
    dice: &mut Dice,
    letters: &[Letter],
) -> Result<(), Error> {
    arrive(transaction, dice, letters).await?;
    transaction.batch_execute("SAVEPOINT before").await?;
    delete(transaction, dice).await?;
    hand_over(transaction, dice).await?;
    transaction.batch_execute("ROLLBACK TO SAVEPOINT before").await?;
    read(transaction, dice).await?;
    transaction.batch_execute("SAVEPOINT before").await?;
    tidy_up(transaction, dice).await
}

/// Splitmix64: random enough for a mailbox.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        // The standard library seeds every RandomState anew.
        Dice(RandomState::new().build_hasher().finish())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `limit`, which is above 0.
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len() as u64) as usize]
    }

    fn user(&mut self) -> i64 {
        1 + self.below(USERS.len() as u64) as i64
    }
}
