// SPDX-License-Identifier: GPL-2.0-only
/* The source task: from the source's receive queue into the ring. */
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/net.h>
#include <linux/uio.h>
#include "omss.h"

/* A smaller rest of a page is not worth a read. */
#define LEAST		2048
/* What is after the last whole packet is less; and so much is worth a read. */
#define MOST_PENDING	(2 * OMSS_TS_PACKET)

/* 0 bytes of room: look (MSG_PEEK) or throw away (MSG_TRUNC). */
static int receive(struct socket *sock, struct bio_vec *frag, unsigned int frags, size_t bytes,
		   int flags)
{
	struct msghdr msg = { };

	iov_iter_bvec(&msg.msg_iter, ITER_DEST, frag, frags, bytes);
	return sock_recvmsg(sock, &msg, flags | MSG_DONTWAIT);
}

static void dropped(struct omss_session *session, unsigned int reason)
{
	WRITE_ONCE(session->dropped[reason], session->dropped[reason] + 1);
}

static void add(struct omss_session *session, struct omss_entry *entry)
{
	WRITE_ONCE(session->received, session->received + entry->bytes);
	omss_ring_add(&session->ring, entry);
}

/* There is no memory, and the source must not be held up: what it has sent is lost. */
static int discard(struct omss_session *session, struct socket *sock)
{
	int err = receive(sock, NULL, 0, session->setup.entry, MSG_TRUNC);

	if (err > 0)
		dropped(session, OMSS_DROP_MEMORY);
	return err;
}

static int read_raw(struct omss_session *session, struct socket *sock)
{
	struct omss_entry *entry;
	struct bio_vec frag;
	int err;

	if (omss_ring_room(&session->ring, &frag, session->setup.entry,
			   min_t(u32, session->setup.entry, LEAST)))
		return discard(session, sock);
	err = receive(sock, &frag, 1, frag.bv_len, 0);
	if (err <= 0)
		return err;
	entry = omss_ring_carve(&session->ring, err);
	if (entry)
		add(session, entry);
	else
		dropped(session, OMSS_DROP_MEMORY);
	return err;
}

/* Whole packets from `bytes` on that make one entry. */
static u32 measure(struct omss_session *session, const u8 *bytes)
{
	struct omss_ts *ts = session->ts;
	u32 length = 0;

	do {
		omss_ts_packet(ts, &session->ring, bytes + length, session->ring.head);
		length += OMSS_TS_PACKET;
	} while (length + OMSS_TS_PACKET <= min(ts->pending, session->setup.entry) &&
		 omss_ts_synced(bytes + length) && !omss_ts_begins(bytes + length));
	return length;
}

/* The first of the pending bytes become an entry. */
static void cut_off(struct omss_session *session, u32 bytes)
{
	struct omss_entry *entry = omss_ring_carve(&session->ring, bytes);

	if (entry) {
		add(session, entry);
	} else {
		session->ring.room.offset += bytes;
		dropped(session, OMSS_DROP_MEMORY);
	}
	session->ts->pending -= bytes;
}

/* After a gap: what is left of a packet whose beginning was lost is not worth more. */
static void skip_torn(struct omss_session *session, const u8 *bytes)
{
	struct omss_ts *ts = session->ts;
	u32 length = omss_ts_resync(bytes, ts->pending);

	session->ring.room.offset += length;
	ts->pending -= length;
	ts->lost = !ts->pending;
	if (length)
		dropped(session, OMSS_DROP_FRAMING);
}

/* Make entries of all packets that are whole, and of bytes that belong to none. */
static void cut(struct omss_session *session)
{
	struct page_frag *room = &session->ring.room;
	struct omss_ts *ts = session->ts;
	u8 *bytes;

	while (ts->pending) {
		bytes = page_address(room->page) + room->offset;
		if (ts->lost)
			skip_torn(session, bytes);
		else if (!omss_ts_synced(bytes))
			cut_off(session, omss_ts_resync(bytes, ts->pending));
		else if (ts->pending >= OMSS_TS_PACKET)
			cut_off(session, measure(session, bytes));
		else
			return;
	}
}

/* Room behind the bytes that wait for the rest of their packet; they may have to move. */
static int packet_room(struct omss_session *session, struct bio_vec *frag)
{
	u32 most = max_t(u32, session->setup.entry, MOST_PENDING);
	struct page_frag *room = &session->ring.room;
	u32 pending = session->ts->pending;
	u8 rest[MOST_PENDING];

	if (room->page && room->size - room->offset > MOST_PENDING) {
		if (omss_ring_room(&session->ring, frag, most, 0))
			return -ENOMEM;
	} else {
		if (pending)
			memcpy(rest, page_address(room->page) + room->offset, pending);
		if (omss_ring_room(&session->ring, frag, most, PAGE_SIZE))
			return -ENOMEM;
		memcpy(bvec_virt(frag), rest, pending);
	}
	frag->bv_offset += pending;
	frag->bv_len -= pending;
	return 0;
}

static int read_packets(struct omss_session *session, struct socket *sock)
{
	struct bio_vec frag;
	int err;

	if (packet_room(session, &frag)) {
		session->ts->pending = 0;
		session->ts->lost = true;
		session->ts->have_pat = false;
		return discard(session, sock);
	}
	err = receive(sock, &frag, 1, frag.bv_len, 0);
	if (err > 0) {
		session->ts->pending += err;
		cut(session);
	} else if (!err && session->ts->pending) {
		cut_off(session, session->ts->pending);
	}
	return err;
}

/* Room for a whole datagram, in as few pieces as there are large pages. */
static struct omss_entry *datagram_room(struct omss_session *session, u32 bytes)
{
	struct omss_ring *ring = &session->ring;
	struct omss_entry *entry;
	struct bio_vec frag;
	u32 left = bytes;

	entry = omss_entry_new(bytes ? DIV_ROUND_UP(bytes, PAGE_SIZE) + 1 : 0);
	if (!entry)
		return NULL;
	while (left) {
		if (omss_ring_room(ring, &frag, left, min_t(u32, left, SZ_32K)) || !frag.bv_len) {
			omss_entry_put(entry);
			return NULL;
		}
		get_page(frag.bv_page);
		ring->room.offset += frag.bv_len;
		entry->frag[entry->frags++] = frag;
		left -= frag.bv_len;
	}
	entry->bytes = bytes;
	atomic_long_add(bytes, &omss_memory);
	return entry;
}

/* It was shorter than announced: someone else has read the one that we looked at. */
static void shorten(struct omss_entry *entry, u32 bytes)
{
	u32 end = 0;
	unsigned int i;

	atomic_long_sub(entry->bytes - bytes, &omss_memory);
	entry->bytes = bytes;
	for (i = 0; i < entry->frags; i++) {
		entry->frag[i].bv_len = min(entry->frag[i].bv_len, bytes - end);
		end += entry->frag[i].bv_len;
	}
}

static int read_datagram(struct omss_session *session, struct socket *sock)
{
	int err = receive(sock, NULL, 0, 0, MSG_PEEK | MSG_TRUNC), got;
	struct omss_entry *entry;

	if (err < 0)
		return err;
	entry = err <= session->setup.entry ? datagram_room(session, err) : NULL;
	if (!entry) {
		dropped(session, err > session->setup.entry ? OMSS_DROP_SIZE : OMSS_DROP_MEMORY);
		receive(sock, NULL, 0, 0, MSG_TRUNC);
		return 1;
	}
	got = receive(sock, entry->frag, entry->frags, err, MSG_TRUNC);
	if (got < 0 || got > err) {
		omss_entry_put(entry);
		if (got < 0)
			return got;
		dropped(session, OMSS_DROP_SIZE);
		return 1;
	}
	shorten(entry, got);
	if (session->ts)
		omss_ts_datagram(session->ts, &session->ring, entry);
	add(session, entry);
	return 1;
}

/* What ICMP has told a datagram socket is in front of what it has received, once. */
static bool passing(const struct omss_session *session, int err)
{
	return !session->source.stream &&
	       (err == -ECONNREFUSED || err == -EHOSTUNREACH || err == -ENETUNREACH);
}

static void source_over(struct omss_session *session, int err)
{
	session->error = -err;
	WRITE_ONCE(session->over, true);
	omss_session_arrived(session, true);
}

static int read_some(struct omss_session *session, struct socket *sock)
{
	if (!session->source.stream)
		return read_datagram(session, sock);
	return session->ts ? read_packets(session, sock) : read_raw(session, sock);
}

bool omss_source_run(struct omss_task *task, struct omss_batch *batch)
{
	struct omss_session *session = container_of(task, struct omss_session, task);
	/* No more at a time than sinks can be behind: it is their turn in between. */
	unsigned int most = min_t(u32, READ_ONCE(session->burst), OMSS_QUANTUM), turns;
	u64 head = session->ring.head;
	struct file *file;
	int err = 0;

	if (session->over)
		return false;
	file = omss_file(session->source.sk);
	if (!file) /* it is being closed, and the session ended */
		return false;
	for (turns = 0; turns < most; turns++) {
		err = read_some(session, session->source.sk->sk_socket);
		if (err <= 0)
			break;
	}
	fput(file);
	if (session->ring.head != head)
		omss_session_arrived(session, false);
	if (session->source.stream && err <= 0 && err != -EAGAIN)
		source_over(session, err);
	return err > 0 || passing(session, err);
}
