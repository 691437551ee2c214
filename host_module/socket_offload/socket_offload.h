/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef _SKOFF_H
#define _SKOFF_H

#include <linux/bits.h>
#include <net/sock.h>
#include <net/tcp.h>
#include "uapi/socket_offload.h"

/*
 * A frozen socket is made to believe that the network is full: whatever wants to
 * send data sees no room in the congestion window (tcp_cwnd_test()).
 */
#define SKOFF_FULL	BIT(30)

#define SKOFF_STATES	(TCPF_ESTABLISHED | TCPF_FIN_WAIT1 | TCPF_FIN_WAIT2 | \
			 TCPF_CLOSE_WAIT | TCPF_CLOSING | TCPF_LAST_ACK)
/* States in which our FIN is in the send queue, and the peer's was received. */
#define SKOFF_FIN_SENT	(TCPF_FIN_WAIT1 | TCPF_CLOSING | TCPF_LAST_ACK)
#define SKOFF_FIN_RCVD	(TCPF_CLOSE_WAIT | TCPF_CLOSING | TCPF_LAST_ACK)

static inline bool skoff_in(int state, int states)
{
	return BIT(state) & states;
}

/* freeze.c: all but attach_filter() under the socket lock */
int skoff_attach_filter(struct socket *sock, int filter);
void skoff_freeze(struct sock *sk);
void skoff_thaw(struct sock *sk);
void skoff_unblock(struct sock *sk);
bool skoff_is_frozen(const struct sock *sk);
u32 skoff_unsuitable(struct sock *sk);
u32 skoff_refused(struct sock *sk);

/* export.c, import.c */
int skoff_freeze_export(struct socket *sock, struct skoff_export *call);
int skoff_import_into(struct socket *sock, struct skoff_import *call);

/* queue.c: between socket queues and the caller's memory */
struct skoff_lengths {
	u32 segments, receive, unacked, unsent, out_of_order;
};

void skoff_measure(const struct sock *sk, struct skoff_lengths *lengths);
int skoff_copy_queues(struct sock *sk, const struct skoff_lengths *lengths,
		      void __user *to);
int skoff_fill_receive(struct sock *sk, const void __user *from, u32 length);
int skoff_fill_fin(struct sock *sk);
int skoff_fill_send(struct sock *sk, const void __user *from, u32 length);
int skoff_fill_segments(struct sock *sk, const void __user *headers,
			const void __user *from, u32 count, u32 length);

/* options.c */
void skoff_export_options(struct sock *sk, struct skoff_snapshot *snapshot);
int skoff_import_options(struct socket *sock,
			 const struct skoff_snapshot *snapshot);
void skoff_import_buffers(struct sock *sk, const struct skoff_snapshot *snapshot);

/* warm.c */
void skoff_export_warm(struct sock *sk, struct skoff_warm *warm);
void skoff_import_warm(struct sock *sk, const struct skoff_snapshot *snapshot);
void skoff_shift_congestion(struct sock *sk, u32 jiffies_by, u64 us_by);

#endif
