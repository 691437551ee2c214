// SPDX-License-Identifier: GPL-2.0-only
/*
 * The payload: entries in a ring, each copied once from the source into pages of
 * our own. The pages of received packets would save that copy, but they may still
 * be writable by who sent them (spliced page cache on loopback and virtio), and
 * two sinks, or a retransmission, would then say different things.
 *
 * The thesis counts in each entry the sinks that have still to send it, and drops
 * an entry by counting down for each slow sink. Here a sink has a cursor instead:
 * the tail moves on in O(1), whatever the number of sinks, and a sink finds out
 * when it is served that its cursor is below the tail. `users` counts only the
 * ring, and who is about to send the entry.
 *
 * Payload that was handed to a socket may be on the wire, or be retransmitted, long
 * after the ring has dropped it: room is carved from pages that are left when they
 * are full (skb_page_frag_refill() begins anew only in one that is ours alone).
 * Entries in a row are contiguous, so that many of them make one fragment.
 */
#include <linux/math64.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include "omss.h"

unsigned long omss_max_memory = 256;
module_param_named(max_memory, omss_max_memory, ulong, 0644);
MODULE_PARM_DESC(max_memory, "MiB of payload in all rings (256)");

atomic_long_t omss_memory;

static u32 slot_of(const struct omss_ring *ring, u64 seq)
{
	u32 rest;

	div_u64_rem(seq, ring->size, &rest);
	return rest;
}

int omss_ring_init(struct omss_ring *ring, u32 size)
{
	spin_lock_init(&ring->lock);
	ring->size = size;
	ring->slot = kvcalloc(size, sizeof(*ring->slot), GFP_KERNEL_ACCOUNT);
	return ring->slot ? 0 : -ENOMEM;
}

/* Nobody uses it any more. */
void omss_ring_free(struct omss_ring *ring)
{
	for (; ring->tail < ring->head; ring->tail++)
		omss_entry_put(ring->slot[slot_of(ring, ring->tail)]);
	kvfree(ring->slot);
	if (ring->room.page)
		put_page(ring->room.page);
}

struct omss_entry *omss_entry_new(unsigned int frags)
{
	struct omss_entry *entry;

	entry = kzalloc(struct_size(entry, frag, frags), GFP_KERNEL | __GFP_NOWARN);
	if (entry)
		refcount_set(&entry->users, 1);
	return entry;
}

void omss_entry_put(struct omss_entry *entry)
{
	unsigned int i;

	if (!refcount_dec_and_test(&entry->users))
		return;
	for (i = 0; i < entry->frags; i++)
		put_page(entry->frag[i].bv_page);
	atomic_long_sub(entry->bytes, &omss_memory);
	kfree(entry);
}

static bool too_much(u32 bytes)
{
	return atomic_long_read(&omss_memory) + bytes > READ_ONCE(omss_max_memory) << 20;
}

/*
 * Contiguous room for at most `most` bytes, at least `least` where that is to be
 * had at all (else a page is). The same room comes back until it is carved.
 */
int omss_ring_room(struct omss_ring *ring, struct bio_vec *frag, u32 most, u32 least)
{
	struct page_frag *room = &ring->room;

	if (too_much(most))
		return -ENOMEM;
	if (!room->page || room->size - room->offset < least) {
		/* A full page that is ours alone comes back as a whole. */
		if (!skb_page_frag_refill(least, room, GFP_KERNEL | __GFP_NOWARN))
			return -ENOMEM;
	}
	bvec_set_page(frag, room->page, min(most, room->size - room->offset), room->offset);
	return 0;
}

/* The first bytes of the room become an entry. */
struct omss_entry *omss_ring_carve(struct omss_ring *ring, u32 bytes)
{
	struct omss_entry *entry = omss_entry_new(1);

	if (!entry)
		return NULL;
	bvec_set_page(&entry->frag[0], ring->room.page, bytes, ring->room.offset);
	get_page(ring->room.page);
	ring->room.offset += bytes;
	entry->frags = 1;
	entry->bytes = bytes;
	atomic_long_add(bytes, &omss_memory);
	return entry;
}

/* The ring takes the reference over. */
void omss_ring_add(struct omss_ring *ring, struct omss_entry *entry)
{
	u32 slot = slot_of(ring, ring->head);
	struct omss_entry *old = NULL;

	spin_lock(&ring->lock);
	if (ring->head - ring->tail == ring->size) {
		old = ring->slot[slot];
		ring->memory -= old->bytes;
		WRITE_ONCE(ring->tail, ring->tail + 1);
	}
	ring->slot[slot] = entry;
	ring->memory += entry->bytes;
	if (ring->mark_next) {
		ring->mark_next = false;
		entry->sync = true;
		ring->last_sync = ring->head + 1;
		ring->syncs++;
	}
	WRITE_ONCE(ring->head, ring->head + 1);
	spin_unlock(&ring->lock);
	if (old)
		omss_entry_put(old);
}

/* The source task's: the entry, which may be the next to come, is a sync point. */
void omss_ring_mark(struct omss_ring *ring, u64 seq)
{
	spin_lock(&ring->lock);
	if (seq == ring->head) {
		ring->mark_next = true;
	} else if (seq >= ring->tail) {
		ring->slot[slot_of(ring, seq)]->sync = true;
		ring->last_sync = seq + 1;
		ring->syncs++;
	}
	spin_unlock(&ring->lock);
}

/* The first sync point that is `from` or later. */
bool omss_ring_find_sync(struct omss_ring *ring, u64 from, u64 *seq)
{
	bool found = false;
	u64 at;

	spin_lock(&ring->lock);
	for (at = max(from, ring->tail); at < ring->last_sync && !found; at++)
		found = ring->slot[slot_of(ring, at)]->sync;
	spin_unlock(&ring->lock);
	*seq = at - 1;
	return found;
}

/* The newest one, if it is still here. */
bool omss_ring_last_sync(struct omss_ring *ring, u64 *seq)
{
	bool found;

	spin_lock(&ring->lock);
	*seq = ring->last_sync - 1;
	found = ring->last_sync > ring->tail;
	spin_unlock(&ring->lock);
	return found;
}

/* Append an entry's payload from `offset` on; the number of fragments then, or 0: no room. */
unsigned int omss_append_frags(struct bio_vec *to, unsigned int count, unsigned int most,
			       const struct omss_entry *entry, u32 offset)
{
	struct bio_vec *last;
	unsigned int i;

	for (i = 0; i < entry->frags; i++) {
		struct bio_vec frag = entry->frag[i];

		if (offset >= frag.bv_len) {
			offset -= frag.bv_len;
			continue;
		}
		frag.bv_offset += offset;
		frag.bv_len -= offset;
		offset = 0;
		last = count ? &to[count - 1] : NULL;
		if (last && last->bv_page == frag.bv_page &&
		    last->bv_offset + last->bv_len == frag.bv_offset) {
			last->bv_len += frag.bv_len;
			continue;
		}
		if (count == most)
			return 0;
		to[count++] = frag;
	}
	return count;
}

void omss_batch_drop(struct omss_batch *batch)
{
	while (batch->count)
		omss_entry_put(batch->entry[--batch->count]);
	batch->ring = NULL;
}

static void take_entries(struct omss_batch *batch, struct omss_ring *ring, u64 from)
{
	spin_lock(&ring->lock);
	batch->head = ring->head;
	for (; from >= ring->tail && from < ring->head && batch->count < OMSS_BATCH; from++) {
		struct omss_entry *entry = ring->slot[slot_of(ring, from)];

		refcount_inc(&entry->users);
		batch->entry[batch->count++] = entry;
	}
	spin_unlock(&ring->lock);
}

/*
 * The entries from `from` on, as many as one send may take. Sinks that keep up all
 * stand at the same entry: the batch of the last one is used again.
 */
void omss_batch_fill(struct omss_batch *batch, struct omss_ring *ring, u64 from)
{
	unsigned int i, frags;

	if (batch->ring == ring && batch->from == from && batch->head == READ_ONCE(ring->head))
		return;
	omss_batch_drop(batch);
	batch->ring = ring;
	batch->from = from;
	batch->bytes = 0;
	batch->frags = 0;
	take_entries(batch, ring, from);
	for (i = 0; i < batch->count; i++) {
		if (i && batch->bytes + batch->entry[i]->bytes > OMSS_BATCH_BYTES)
			break;
		frags = omss_append_frags(batch->frag, batch->frags, OMSS_BATCH,
					  batch->entry[i], 0);
		if (!frags && batch->entry[i]->bytes)
			break;
		batch->frags = frags ?: batch->frags;
		batch->bytes += batch->entry[i]->bytes;
	}
	while (batch->count > i)
		omss_entry_put(batch->entry[--batch->count]);
}
