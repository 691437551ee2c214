/* SPDX-License-Identifier: Apache-2.0 */
/*
 * streamlift_fanout: the same bytes to many sockets, without Python between two sends.
 *
 * A turn of a relay gives each of a thousand sockets the same few buffers. What Python does between two system calls costs as
 * much as a tenth of them; here it is done once a turn, and other threads run meanwhile. hypervisor_svc/fanout.py is the manual
 * and does the same without this file.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>

#include <errno.h>
#include <limits.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/socket.h>

#include "send_ring.h"

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum { FLAGS = MSG_DONTWAIT | MSG_NOSIGNAL };
/* For fewer sockets a ring is not worth it. */
enum { FEW = 8 };

/* The sockets of one call: `count` of `fds` from `start` on, the first after the last. */
struct herd {
	Py_buffer fds;
	Py_ssize_t size, start, count;
};

/* What is given to each, and who did not take all of it. */
struct misfit {
	Py_ssize_t index;
	long long result;
};

struct outcome {
	struct misfit *misfits;
	Py_ssize_t count;
};

static int fd_at(const struct herd *herd, Py_ssize_t index)
{
	return ((const int *)herd->fds.buf)[index];
}

static void note(struct outcome *outcome, Py_ssize_t index, long long result)
{
	outcome->misfits[outcome->count++] = (struct misfit){ index, result };
}

static int herd_take(struct herd *herd, PyObject *fds, Py_ssize_t start, Py_ssize_t count)
{
	if (PyObject_GetBuffer(fds, &herd->fds, PyBUF_SIMPLE) < 0)
		return -1;
	herd->size = herd->fds.len / (Py_ssize_t)sizeof(int);
	herd->start = start;
	herd->count = count;
	if (start >= 0 && count >= 0 && count <= herd->size && (start < herd->size || !count))
		return 0;
	PyBuffer_Release(&herd->fds);
	PyErr_Format(PyExc_ValueError, "%zd sockets from %zd on, of %zd", count, start, herd->size);
	return -1;
}

static PyObject *outcome_list(const struct outcome *outcome)
{
	PyObject *list = PyList_New(outcome->count);

	for (Py_ssize_t i = 0; list && i < outcome->count; i++) {
		PyObject *pair = Py_BuildValue("nL", outcome->misfits[i].index, outcome->misfits[i].result);

		if (!pair)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, pair);
	}
	return list;
}

/* Buffers. */

struct payload {
	Py_buffer *buffers;
	struct iovec *iov;
	Py_ssize_t count;
	size_t bytes;
};

static void payload_release(struct payload *payload)
{
	for (Py_ssize_t i = 0; i < payload->count; i++)
		PyBuffer_Release(&payload->buffers[i]);
	PyMem_Free(payload->buffers);
	PyMem_Free(payload->iov);
}

static int payload_take(struct payload *payload, PyObject *sequence)
{
	Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence);

	*payload = (struct payload){ 0 };
	if (count < 1 || count > IOV_MAX) {
		PyErr_Format(PyExc_ValueError, "%zd buffers; 1 to %d can be sent at once", count, IOV_MAX);
		return -1;
	}
	payload->buffers = PyMem_Calloc(count, sizeof(*payload->buffers));
	payload->iov = PyMem_Calloc(count, sizeof(*payload->iov));
	if (!payload->buffers || !payload->iov) {
		PyErr_NoMemory();
		payload_release(payload);
		return -1;
	}
	for (; payload->count < count; payload->count++) {
		Py_buffer *buffer = &payload->buffers[payload->count];

		if (PyObject_GetBuffer(PySequence_Fast_GET_ITEM(sequence, payload->count), buffer, PyBUF_SIMPLE) < 0) {
			payload_release(payload);
			return -1;
		}
		payload->iov[payload->count] = (struct iovec){ buffer->buf, buffer->len };
		payload->bytes += buffer->len;
	}
	return 0;
}

/* One turn of each kind; without the interpreter's lock. */

/* send() is the cheaper call, and one buffer the usual case. */
static ssize_t send_iov(int fd, struct iovec *iov, Py_ssize_t count)
{
	const struct msghdr message = { .msg_iov = iov, .msg_iovlen = count };

	if (count == 1)
		return send(fd, iov->iov_base, iov->iov_len, FLAGS);
	return sendmsg(fd, &message, FLAGS);
}

/* The same message to each, by the ring; how many had their turn: all, none if there is no ring, or the first so many. */
static Py_ssize_t ring_turn(const struct herd *herd, const struct msghdr *message, size_t bytes, struct outcome *outcome)
{
	const bool plain = message->msg_iovlen == 1 && !message->msg_controllen;
	struct send_ring *ring = herd->count < FEW || bytes > INT_MAX ? NULL : send_ring_take();
	Py_ssize_t done = 0, wanted, turn;

	if (!ring)
		return 0;
	do {
		wanted = herd->count - done < SEND_RING_SIZE ? herd->count - done : SEND_RING_SIZE;
		for (Py_ssize_t i = 0; i < wanted; i++) {
			int fd = fd_at(herd, (herd->start + done + i) % herd->size);

			if (plain)
				send_ring_add(ring, IORING_OP_SEND, fd, message->msg_iov->iov_base, bytes, FLAGS);
			else
				send_ring_add(ring, IORING_OP_SENDMSG, fd, message, 1, FLAGS);
		}
		turn = send_ring_submit(ring);
		for (Py_ssize_t i = 0; i < turn; i++)
			if (send_ring_result(ring, i) != (int)bytes)
				note(outcome, (herd->start + done + i) % herd->size, send_ring_result(ring, i));
		done += turn;
	} while (turn == wanted && done < herd->count);
	send_ring_give(ring);
	return done;
}

static void stream_turn(const struct herd *herd, const struct payload *payload, struct outcome *outcome)
{
	const struct msghdr message = { .msg_iov = payload->iov, .msg_iovlen = payload->count };

	for (Py_ssize_t i = ring_turn(herd, &message, payload->bytes, outcome); i < herd->count; i++) {
		Py_ssize_t at = (herd->start + i) % herd->size;
		ssize_t sent = send_iov(fd_at(herd, at), payload->iov, payload->count);

		if (sent != (ssize_t)payload->bytes)
			note(outcome, at, sent < 0 ? -errno : sent);
	}
}

static void datagram_turn(const struct herd *herd, const struct payload *payload, struct outcome *outcome)
{
	const struct msghdr message = { .msg_iov = payload->iov, .msg_iovlen = 1 };

	for (Py_ssize_t i = payload->count == 1 ? ring_turn(herd, &message, payload->bytes, outcome) : 0; i < herd->count; i++) {
		Py_ssize_t at = (herd->start + i) % herd->size;
		Py_ssize_t sent = 0;

		while (sent < payload->count && send_iov(fd_at(herd, at), &payload->iov[sent], 1) >= 0)
			sent++;
		if (sent != payload->count)
			note(outcome, at, sent ? sent : -errno);
	}
}

/* One send of many equally long datagrams: UDP_SEGMENT, udp(7); all or nothing. */
static void burst_turn(const struct herd *herd, const struct payload *payload, int size, struct outcome *outcome)
{
	union {
		char bytes[CMSG_SPACE(sizeof(uint16_t))];
		struct cmsghdr align;
	} control = { 0 };
	const struct msghdr message = {
		.msg_iov = payload->iov,
		.msg_iovlen = payload->count,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	const uint16_t segment = size;

	header->cmsg_level = IPPROTO_UDP;
	header->cmsg_type = UDP_SEGMENT;
	header->cmsg_len = CMSG_LEN(sizeof(segment));
	memcpy(CMSG_DATA(header), &segment, sizeof(segment));
	for (Py_ssize_t i = ring_turn(herd, &message, payload->bytes, outcome); i < herd->count; i++) {
		Py_ssize_t at = (herd->start + i) % herd->size;

		if (sendmsg(fd_at(herd, at), &message, FLAGS) < 0)
			note(outcome, at, -errno);
	}
}

static void file_turn(const struct herd *herd, int file, off_t offset, size_t length, struct outcome *outcome)
{
	for (Py_ssize_t i = 0, at = herd->start; i < herd->count; i++, at = (at + 1) % herd->size) {
		off_t from = offset;
		ssize_t sent = sendfile(fd_at(herd, at), file, &from, length);

		if (sent != (ssize_t)length)
			note(outcome, at, sent < 0 ? -errno : sent);
	}
}

/* What Python calls. */

enum kind { STREAM, DATAGRAM, BURST };

static PyObject *send_buffers(enum kind kind, PyObject *args, const char *format)
{
	struct outcome outcome = { 0 };
	Py_ssize_t start, count;
	struct payload payload;
	PyObject *fds, *buffers, *list = NULL;
	struct herd herd;
	int size = 0;

	if (!PyArg_ParseTuple(args, format, &fds, &start, &count, &buffers, &size))
		return NULL;
	buffers = PySequence_Fast(buffers, "a sequence of buffers is needed");
	if (!buffers)
		return NULL;
	if (payload_take(&payload, buffers) < 0)
		goto err_buffers;
	if (herd_take(&herd, fds, start, count) < 0)
		goto err_payload;
	outcome.misfits = PyMem_Calloc(count ? count : 1, sizeof(*outcome.misfits));
	if (!outcome.misfits) {
		PyErr_NoMemory();
		goto err_herd;
	}
	Py_BEGIN_ALLOW_THREADS
	if (kind == STREAM)
		stream_turn(&herd, &payload, &outcome);
	else if (kind == DATAGRAM)
		datagram_turn(&herd, &payload, &outcome);
	else
		burst_turn(&herd, &payload, size, &outcome);
	Py_END_ALLOW_THREADS
	list = outcome_list(&outcome);
	PyMem_Free(outcome.misfits);
err_herd:
	PyBuffer_Release(&herd.fds);
err_payload:
	payload_release(&payload);
err_buffers:
	Py_DECREF(buffers);
	return list;
}

static PyObject *send_stream(PyObject *self, PyObject *args)
{
	return send_buffers(STREAM, args, "OnnO:send_stream");
}

static PyObject *send_datagrams(PyObject *self, PyObject *args)
{
	return send_buffers(DATAGRAM, args, "OnnO:send_datagrams");
}

static PyObject *send_burst(PyObject *self, PyObject *args)
{
	return send_buffers(BURST, args, "OnnOi:send_burst");
}

static PyObject *send_file(PyObject *self, PyObject *args)
{
	struct outcome outcome = { 0 };
	Py_ssize_t start, count, length;
	PyObject *fds, *list = NULL;
	struct herd herd;
	long long offset;
	int file;

	if (!PyArg_ParseTuple(args, "OnniLn:send_file", &fds, &start, &count, &file, &offset, &length))
		return NULL;
	if (herd_take(&herd, fds, start, count) < 0)
		return NULL;
	outcome.misfits = PyMem_Calloc(count ? count : 1, sizeof(*outcome.misfits));
	if (outcome.misfits) {
		Py_BEGIN_ALLOW_THREADS
		file_turn(&herd, file, offset, length, &outcome);
		Py_END_ALLOW_THREADS
		list = outcome_list(&outcome);
		PyMem_Free(outcome.misfits);
	} else {
		PyErr_NoMemory();
	}
	PyBuffer_Release(&herd.fds);
	return list;
}

static PyMethodDef methods[] = {
	{ "send_stream", send_stream, METH_VARARGS, "send_stream(fds, start, count, buffers)" },
	{ "send_datagrams", send_datagrams, METH_VARARGS, "send_datagrams(fds, start, count, buffers)" },
	{ "send_burst", send_burst, METH_VARARGS, "send_burst(fds, start, count, buffers, size)" },
	{ "send_file", send_file, METH_VARARGS, "send_file(fds, start, count, file, offset, length)" },
	{ 0 }
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "streamlift_fanout",
	.m_doc = "The same bytes to many sockets; see hypervisor_svc/fanout.py.",
	.m_size = 0,
	.m_methods = methods,
};

PyMODINIT_FUNC PyInit_streamlift_fanout(void);

PyMODINIT_FUNC PyInit_streamlift_fanout(void)
{
	return PyModule_Create(&module);
}
